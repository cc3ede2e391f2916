"""The transformers model that tests adapt, and bitsandbytes' layers, each made in one place."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

VOCAB = 64
DEVICE = torch.device("cpu")  # where models and batches go; `device` of conftest.py sets it for a test


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
