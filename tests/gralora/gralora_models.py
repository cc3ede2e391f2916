"""Layers and models with GraLoRA adapters, PEFT's beside them, and a loop over the blocks as the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import GraloraConfig
from peft.tuners.gralora.layer import Linear as PeftGraLoRA
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from flatlora import GraLoRALinear, apply_gralora

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.arange(14).view(2, 7) * 5 % 64


def base_layer(kind, m, n, bias=True):
    """A frozen linear layer (m, n) of each kind that is supported."""
    if kind == "conv1d":
        base = Conv1D(m, n)
        nn.init.normal_(base.bias)
        return base
    if kind == "int8":
        base = bnb.nn.Linear8bitLt(n, m, bias=bias, has_fp16_weights=False)
    elif kind in ("nf4", "fp4", "double"):
        quant_type = "fp4" if kind == "fp4" else "nf4"
        base = bnb.nn.Linear4bit(
            n, m, bias=bias, quant_type=quant_type, compress_statistics=kind == "double", compute_dtype=torch.float32
        )
    else:
        return nn.Linear(n, m, bias=bias).to({"float64": torch.float64, "bf16": torch.bfloat16}.get(kind))
    return base.to("cpu")


def randomised(module, size=0.3):
    """Adapters in which no term of a formula vanishes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "gralora_" in name:
                parameter.normal_(0, size)
    return module


def layer(kind="float64", m=24, n=16, bias=True, **settings):
    settings = {"r": 8, "k": 4, "alpha": 12, **settings}
    return randomised(GraLoRALinear(base_layer(kind, m, n, bias), **settings))


def peft_layer(ours):
    """PEFT's layer over a copy of the base, with the same weights in the same types."""
    config = GraloraConfig(r=ours.r, gralora_k=ours.k, alpha=ours.alpha, hybrid_r=ours.hybrid_r)
    config.fan_in_fan_out = isinstance(ours.base_layer, Conv1D)
    theirs = PeftGraLoRA(copy.deepcopy(ours.base_layer), "default", "fc", config, r=ours.r)
    for (_, own), parameter in zip(gralora_parameters(ours), (p for _, p in gralora_parameters(theirs)), strict=True):
        parameter.data = own.detach().clone()
    return theirs


def gralora_parameters(module):
    """Named without the adapter's name, in one order for this library's and PEFT's modules."""
    found = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in module.named_parameters()
        if "gralora_" in name
    }
    return sorted(found.items())


def gradients(module, x, weight=None):
    """Output, gradient of x and gradients of the adapter for a fixed upstream gradient."""
    x = x.clone().requires_grad_(True)
    out = module(x)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape) if weight is None else weight
    for _, parameter in gralora_parameters(module):
        parameter.grad = None
    out.backward(upstream.to(out.dtype))
    return out.detach(), x.grad, [parameter.grad for _, parameter in gralora_parameters(module)]


def dense_delta(ours):
    """ΔW by a loop over the blocks, from the stored parameters: row block i, column block j."""
    A, B, k, q = ours.gralora_A, ours.gralora_B, ours.k, ours.r // ours.k
    rows = []
    for i in range(k):
        row = []
        for j in range(k):
            A_ij = A[j, :, i * q : (i + 1) * q].t()
            B_ij = B[i, j * q : (j + 1) * q].t()
            row.append(B_ij @ A_ij)
        rows.append(torch.cat(row, 1))
    delta = torch.cat(rows)
    if ours.hybrid_r:
        delta = delta + ours.gralora_B_general.weight @ ours.gralora_A_general.weight
    return delta * (ours.alpha / (ours.r + ours.hybrid_r))


def llama(**config):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **config)).eval()


def gpt2():
    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


def adapted(model=None, targets="all-linear", **settings):
    model = llama() if model is None else model
    return randomised(apply_gralora(model, targets, **{"r": 8, "k": 2, "alpha": 16, **settings}), 0.1)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def photograph(model):
    """Everything a call could have changed: modules, forwards, values, and what is trained."""
    modules = {name: (id(module), module.training, dict(module.__dict__)) for name, module in model.named_modules()}
    for _, _, attributes in modules.values():
        for key in ("_parameters", "_buffers", "_modules"):
            attributes[key] = list(attributes[key])
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, flags, values


def assert_unchanged(model, before):
    modules, flags, values = photograph(model)
    assert modules == before[0] and flags == before[1] and list(values) == list(before[2])
    assert all(torch.equal(values[name], before[2][name]) for name in values)
