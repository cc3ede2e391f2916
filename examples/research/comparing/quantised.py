"""What is left of a fine-tuned model once its adapters are merged and the weights are rounded to 3, 4 or 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from comparing.methods import head_names
from flatlora import GraLoRALinear, merge_gralora, remove_perturbation


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model with its adapters in the weights."""
    model = copy.deepcopy(model)
    remove_perturbation(model)
    if any(isinstance(module, GraLoRALinear) for module in model.modules()):
        return merge_gralora(model)
    return model.merge_and_unload()  # type: ignore[operator]


def nf4(weight: Tensor) -> Tensor:
    """What a `bitsandbytes.nn.Linear4bit` of type NF4 computes with: blocks of 64 weights on one scale."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))


def int8(weight: Tensor) -> Tensor:
    """The weights of a `bitsandbytes.nn.Linear8bitLt`, one scale for each row; it would round activations too."""
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return functional.int8_vectorwise_dequant(codes, scales)


def to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round to nearest: in a row every `group` weights share the scale ``(max - min) / (2^bits - 1)`` and a zero point.

    A last group may be shorter.
    """

    def nearest(w: Tensor) -> Tensor:
        low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(w.dtype).tiny)
        zero = (-low / scale).round()
        return scale * ((w / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero)

    return torch.cat([nearest(part) for part in weight.split(group, 1)], 1)


def hqq(weight: Tensor, bits: int) -> Tensor:
    """What a layer of HQQ computes with: groups of 64 weights, whose zero points are fitted to the weights."""
    from hqq.core.quantize import Quantizer

    options = {"group_size": 64, "axis": 1, "compute_dtype": weight.dtype, "bitpack": False}
    return Quantizer.dequantize(*Quantizer.quantize(weight, nbits=bits, device=str(weight.device), **options))


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": int8,
    "nf4": nf4,
    **{f"rtn{b}_{g}": partial(to_nearest, bits=b, group=g) for b in (4, 3) for g in (32, 64)},
    **({f"hqq{b}_64": partial(hqq, bits=b) for b in (4, 3)} if find_spec("hqq") else {}),
}


@torch.no_grad()
def rounded(model: nn.Module, kind: str) -> nn.Module:
    """A copy of a merged model whose linear layers, the head's aside, have weights rounded as `kind` says."""
    model = copy.deepcopy(model)
    heads = {*head_names(model), "lm_head"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[0] not in heads:
            module.weight.copy_(ROUNDINGS[kind](module.weight).to(module.weight))
    return model
