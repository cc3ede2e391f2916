"""Models of public shapes with random weights, in a dtype, quantised or not, on any device."""

from __future__ import annotations

import argparse
import copy
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported, and peft imports it

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# hidden, intermediate, layers, heads, heads of keys and values, vocabulary, whether embedding and head are one
GEOMETRIES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),  # Qwen2.5-0.5B, and so on
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
SWEEP_VOCABULARY = 8192


def geometry(args: argparse.Namespace) -> tuple[int, int, int, int, int, int, bool]:
    """The sizes of ``--model``, or of ``--width``, with ``--layers`` in the place of the model's own if it is given."""
    if args.width:
        heads = max(1, args.width // 64)
        sizes = (args.width, 3 * args.width, 2, heads, heads, SWEEP_VOCABULARY, True)
    else:
        sizes = GEOMETRIES[args.model]
    return (*sizes[:2], args.layers or sizes[2], *sizes[3:])


def base_model(args: argparse.Namespace) -> nn.Module:
    """The frozen model, the same weights for the same arguments."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = geometry(args)
    qwen = args.model != "135M" and not args.width
    config = (Qwen2Config if qwen else LlamaConfig)(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=max(2048, args.tokens),
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[args.dtype])
    try:
        with torch.device(args.device):
            model = (Qwen2ForCausalLM if qwen else LlamaForCausalLM)(config)
    finally:
        torch.set_default_dtype(before)
    if args.nf4 or args.int8:
        quantise(model, args)
    return model.requires_grad_(False)


def quantise(model: nn.Module, args: argparse.Namespace) -> None:
    """Puts bitsandbytes' NF4 or int8 layer in the place of every linear layer but the head."""
    import bitsandbytes as bnb

    dtype = DTYPES[args.dtype]
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or "lm_head" in name:
            continue
        sizes, bias = (module.in_features, module.out_features), module.bias is not None
        new: nn.Module
        if args.nf4:
            new = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type="nf4", compute_dtype=dtype, device="meta")
            new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, device="meta")
            # Data that is on the GPU already would not be quantised.
            new.weight = bnb.nn.Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        new.bias = module.bias
        new = new.to(args.device)  # quantises
        if args.int8:
            new.init_8bit_state()  # or the first forward would take the weight's scales for its own layer alone
        model.set_submodule(name, new)


def sharing(base: nn.Module) -> nn.Module:
    """A model with modules of its own and the very tensors of `base`, so that all contenders fit beside each other."""
    tensors = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    of_quantised = [getattr(module, name, None) for module in base.modules() for name in ("quant_state", "state")]
    return copy.deepcopy(base, tensors | {id(state): state for state in of_quantised if state is not None})
