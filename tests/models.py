"""The models that tests adapt, and their adapters: every term of a formula is there, as no factor is zero."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")

VOCAB = 64
WIDE = 512  # wide enough for an adapter of rank 8 to have the 4,096 elements from which bitsandbytes uses 8 bits
DEVICE = torch.device("cpu")  # where models and batches go; `device` of conftest.py sets it for a test
AUXILIARY = "ascent_branches"  # the name under which Bi-LoRA's parameters are registered; no adapter file has it
TWO = {"first": {"r": 2, "lora_alpha": 5}, "second": {"r": 3}}  # adapters that are active together


# --- bases --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One layer, `fc`."""

    def __init__(self, fc):
        super().__init__()
        self.fc = fc

    def forward(self, x):
        return self.fc(x)


class MLP(nn.Module):
    """Two layers, `up` and `down`."""

    def __init__(self, n=16, hidden=24, m=12, bias=False):
        super().__init__()
        self.up = nn.Linear(n, hidden, bias=bias)
        self.down = nn.Linear(hidden, m, bias=bias)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class IntLinear(nn.Linear):
    """A base that can only be applied: integer codes, one scale, and a forward of its own."""

    def __init__(self, m, n, bias=True):
        super().__init__(n, m, bias=bias)
        self.weight = nn.Parameter(torch.randint(-20, 21, (m, n), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.03))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def llama(width: int = 32, **config: Any) -> LlamaForCausalLM:
    """A Llama of one layer with two heads, which share one key and value; from the global random stream."""
    defaults = {
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, vocab_size=VOCAB, **{**defaults, **config}))


def quantised(linear: nn.Linear, kind: str) -> nn.Module:
    """`linear` as a bitsandbytes layer: "nf4" (double quantisation), "fp4" or "int8"."""
    import bitsandbytes as bnb

    size, bias = (linear.in_features, linear.out_features), linear.bias is not None
    new: Any
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        form = {"quant_type": kind, "compress_statistics": kind == "nf4"}
        new = bnb.nn.Linear4bit(*size, bias=bias, **form)
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **form)
    if bias:
        new.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return new.to(DEVICE)  # which quantises


def quantise(model: nn.Module, kind: str, but: Iterable[str] = ("lm_head",)) -> nn.Module:
    """Puts bitsandbytes' layers in the place of every linear layer that is not called as in `but`; `model` itself."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith(tuple(but)):
            model.set_submodule(name, quantised(module, kind))
    return model


# --- layers of one's own ------------------------------------------------------------------------------------------


class ParameterLoRA(nn.Module):
    """A hand-made LoRA layer with 2-D parameters (r, n) and (m, r), or both stored the other way around."""

    def __init__(self, m, n, r=3, transposed=False, scaling=1.5):
        super().__init__()
        self.linear = nn.Linear(n, m).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(n, r) if transposed else torch.randn(r, n))
        self.lora_B = nn.Parameter(torch.randn(r, m) if transposed else torch.randn(m, r))
        self.scaling, self.stored_transposed = scaling, transposed

    def forward(self, x):
        a, b = (self.lora_A, self.lora_B) if self.stored_transposed else (self.lora_A.t(), self.lora_B.t())
        return self.linear(x) + self.scaling * (x @ a @ b)

    def dense(self):
        b_a = (self.lora_A @ self.lora_B).t() if self.stored_transposed else self.lora_B @ self.lora_A
        return self.linear.weight + self.scaling * b_a, self.linear.bias


class ModuleLoRA(nn.Linear):
    """A hand-made LoRA layer that is its own base and whose factors are `nn.Linear` modules, with alpha / r scaling."""

    def __init__(self, m, n, r=3, alpha=6):
        super().__init__(n, m)
        self.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False)
        self.lora_alpha, self.r = alpha, r

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x)) * (self.lora_alpha / self.r)

    def dense(self):
        return self.weight + self.lora_alpha / self.r * self.lora_B.weight @ self.lora_A.weight, self.bias


# --- PEFT's adapters ----------------------------------------------------------------------------------------------


def peft(model, targets, dtype=torch.float64, adapters=None, **config):
    """`model` in `dtype` with random adapters; `adapters` maps names to what differs from `config`, all of them active.

    With ``dtype=None`` base and adapters keep the types that PEFT gives them.
    """
    if dtype is not None:
        model = model.to(dtype)
    adapters = adapters or {"default": {}}
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets, **config}
    names = list(adapters)
    for name in names:
        one = LoraConfig(**{**config, **adapters[name]})
        if name == names[0]:
            model = get_peft_model(model, one, adapter_name=name, autocast_adapter_dtype=dtype is None)
        else:
            model.add_adapter(name, one, autocast_adapter_dtype=dtype is None)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    randomise(model)
    return model.train()


def randomise(model, size=0.3):
    """Random B, magnitudes and adapter biases, so that no term of a formula vanishes."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, size)
            elif "lora_A" in name:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif "lora_magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)


def one_layer(m=10, n=7, bias=True, conv1d=False, **config):
    """A PEFT model with one adapted layer `fc`, (m, n), in float64 unless told otherwise."""
    if conv1d:
        fc = Conv1D(m, n)
        nn.init.normal_(fc.weight, 0, 0.3)
        nn.init.normal_(fc.bias)
        config["fan_in_fan_out"] = True
    else:
        fc = nn.Linear(n, m, bias=bias)
    return peft(Net(fc), ["fc"], **config)


def fc(model):
    """The layer of a `Net`, PEFT's model of one too."""
    return next(module for module in model.modules() if isinstance(module, Net)).fc


def quantised_mlp(kind, n=64, hidden=96, m=64, **config):
    model = quantise(MLP(n, hidden, m), kind)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"
    return peft(model, ["up", "down"], None, **config)


def lora_mlp(*, width: int = 32, r: int = 4, dropout: float = 0.0, seed: int = 0, use_dora: bool = False) -> PeftModel:
    """Two layers in a row with a tanh between them, in float32; the same for the same arguments."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    config = {"r": r, "lora_alpha": 2 * r, "lora_dropout": dropout, "use_dora": use_dora}
    return get_peft_model(net, LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **config)).train()


def mlp_with(*names: str, seed: int = 0) -> PeftModel:
    """`up` and `down` of width 8 with adapters of these names: all of them are trained, the first one is active."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    model = get_peft_model(MLP(8, 8, 8, bias=True), config, adapter_name=names[0] if names else "default")
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model.train()


def tiny_llama(
    dtype: torch.dtype | None = torch.float32,
    *,
    width: int = 32,
    layers: int = 1,
    quant: str | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    **config: Any,
) -> PeftModel:
    """A Llama with adapters on all seven projections; the same for the same arguments.

    `quant` is None, ``"nf4"``, ``"fp4"`` or ``"int8"``.
    """
    torch.manual_seed(seed)
    model = llama(width, num_hidden_layers=layers)
    if quant is not None:
        quantise(model, quant)
        dtype = None
    config = {"r": 8, "lora_alpha": 16, "lora_dropout": dropout, "task_type": "CAUSAL_LM", **config}
    return peft(model, "all-linear", dtype, **config)


def tiny_gpt2(dtype=torch.float32, **config):
    base = GPT2LMHeadModel(
        GPT2Config(
            n_layer=1, n_embd=32, n_head=4, vocab_size=VOCAB, n_positions=32, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    return peft(base, ["c_attn", "c_fc"], dtype, fan_in_fan_out=True, **config)


def lora_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that requires a gradient, Bi-LoRA's auxiliary among them."""
    return [p for p in model.parameters() if p.requires_grad]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What a user hands to an optimizer: all that requires a gradient but the auxiliary."""
    return [p for name, p in model.named_parameters() if p.requires_grad and AUXILIARY not in name]
