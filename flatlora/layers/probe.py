"""Finding out what a layer computes by calling it on a few random numbers. The layer is left as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels.low_rank import without_autocast
from .bnb import hold_training_layout

_ROWS = 3  # of random numbers in `inputs`


def readable(*tensors: Any) -> bool:
    """Whether all values can be read: no tensor is on the meta device, sharded (FSDP, ZeRO) or fake."""
    return not any(
        t.is_meta or hasattr(t, "full_tensor") or not t.numel() or type(t).__name__ == "FakeTensor" for t in tensors
    )


def numbers(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float64 from a private generator, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")


def inputs(width: int) -> Tensor:
    """The inputs of a test call: a few rows of numbers, and a row of zeros, whose output is the bias."""
    return torch.cat([numbers(0, _ROWS, width), torch.zeros(1, width, dtype=torch.float64, device="cpu")])


def linear_part(outputs: Tensor) -> Tensor:
    """The outputs for `inputs` without the bias, in float64 on the CPU."""
    rows = outputs.detach().cpu().double().reshape(_ROWS + 1, -1)
    return rows[:-1] - rows[-1:]


def misses(found: Tensor, expected: Tensor) -> float:
    """``‖found − expected‖ / ‖expected‖``; infinite for another shape or a result that is not a number."""
    if found.shape != expected.shape:
        return math.inf
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


@contextmanager
def probing(module: nn.Module) -> Iterator[None]:
    """Within the context a layer computes as in evaluation; attributes and random streams are restored after it."""
    device = next((t.device for t in chain(module.parameters(), module.buffers())), torch.device("cpu"))
    on_cpu = device.type in ("cpu", "meta")
    streams = torch.random.fork_rng(
        devices=[] if on_cpu else [device.index or 0], device_type="cuda" if on_cpu else device.type
    )
    layout = hold_training_layout(module)
    kept = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    try:
        for part, *_ in kept:
            part.training = False  # not eval(): loralib's train() writes to the weight
        with streams, torch.no_grad(), without_autocast(device):
            yield
    finally:
        for part, attributes, buffers in kept:
            for store, values in ((part.__dict__, attributes), (attributes["_buffers"], buffers)):
                store.clear()
                store.update(values)
        layout.release()


_ORIENTATIONS: WeakKeyDictionary[nn.Module, tuple[Any, bool | None]] = WeakKeyDictionary()


def orientation(module: nn.Module, weight: Tensor) -> bool | None:
    """How a layer multiplies by its stored weight: False for ``x·weightᵀ``, True for ``x·weight``.

    None where it computes something else (it scales, unpacks or rounds what it stores) or its values are elsewhere.
    A module is called once for each class, shape and dtype of its weight.
    """
    key = type(module), weight.shape, weight.dtype, "forward" in module.__dict__
    known = _ORIENTATIONS.get(module)
    if known is None or known[0] != key:
        if not readable(weight):
            return None
        known = _ORIENTATIONS[module] = key, _find_orientation(module, weight)
    return known[1]


def _find_orientation(module: Any, weight: Tensor) -> bool | None:
    # Above the rounding of outputs, below the difference that another weight of that size makes.
    bound = 3e-3 if weight.dtype in (torch.float32, torch.float64) else 1e-2
    for transposed, stored in ((False, weight), (True, weight.t())):
        x = inputs(stored.shape[1]).to(weight.device, weight.dtype)
        try:
            with probing(module):
                y, expected = module(x), x @ stored.t()
        except Exception:  # whatever its forward raises for inputs that it does not expect
            continue
        fits = isinstance(y, Tensor) and y.shape == expected.shape
        if fits and misses(linear_part(y), linear_part(expected)) < bound:
            return transposed
    return None
