"""Which passes are perturbed: those that train the adapters of an optimizer, and no other.

A layer is perturbed in a forward pass if it is in train mode, an adapter that the optimizer trains is among those that
it adds, and the pass records gradients. Two kinds of passes record none and are perturbed all the same, as they are run
again with gradients and make up one loss with the second run:

- The first pass of a reentrant checkpoint, whoever wrote it. It runs within the forward of a
  `torch.autograd.Function` that autograd will call backward: its context has edges into the graph, which that of a
  checkpoint under `torch.no_grad()` has not. A function with `setup_context` has no context yet; there the criterion is
  whether an input requires a gradient, as an outer `torch.no_grad()` can't be seen. (Nor can `torch.no_grad()` within
  the checkpointed region; such layers are perturbed in the first pass.)
- The first pass of sentence-transformers' cached losses (GradCache, arXiv:2101.06983). That of other implementations
  can't be told from a pass that is no part of the loss, such as one for old log-probabilities.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable
from types import CodeType, FrameType

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from ..layers.adapter import Adapter
from ..layers.view import LoRALayer
from .source import Source


def would_perturb(source: Source, layer: LoRALayer, adapters: Iterable[Adapter]) -> bool:
    """Whether a pass that begins now and records gradients is perturbed; `adapters` are those that the layer adds."""
    if source.always:
        return layer.active
    if not layer.module.training:
        return False
    seen = [adapter for adapter in adapters if adapter.name in layer.names]
    return bool(seen) if source.replaying else any(adapter.trained for adapter in seen)


def records_gradients(source: Source) -> bool:
    """Whether the pass that begins now records gradients, or counts as one that does."""
    if torch.is_grad_enabled() or source.no_grad or source.always:
        return True
    return torch.compiler.is_compiling() or runs_again_with_gradients()  # a graph asks whenever it runs


def runs_again_with_gradients() -> bool:
    """Whether a pass without gradients is the first of two, of which the second has them; see the top of this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Code is looked at before variables, which Python copies for whoever reads them.
        if _is_forward(frame.f_code) and _will_run_backward(frame):
            return True
        if frame.f_code.co_name == "embed_minibatch" and _caches_gradients(frame):
            return True
        frame = frame.f_back
    return False


@functools.cache
def _is_forward(code: CodeType) -> bool:
    """Whether it is the forward of an autograd function, decorated or not. From torch 2.14 on C calls it."""
    classes: list[type[Function]] = [Function]
    while classes:
        for cls in classes.pop().__subclasses__():
            classes.append(cls)
            forward = vars(cls).get("forward")
            while forward is not None:
                if getattr(forward, "__code__", None) is code:
                    return True
                forward = getattr(forward, "__func__", getattr(forward, "__wrapped__", None))
    return False


def _will_run_backward(forward: FrameType) -> bool:
    """Whether autograd will call backward of the function whose `forward` is running."""
    names, varargs, _, found = inspect.getargvalues(forward)
    given = [*(found.get(name) for name in names), *found.get(varargs or "", ())]
    for one in given:
        if isinstance(one, FunctionCtx):
            return bool(one.next_functions)  # type: ignore[attr-defined]
    return any(isinstance(one, Tensor) and one.requires_grad for one in given)


def _caches_gradients(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return module.startswith("sentence_transformers.") and frame.f_locals.get("with_grad") is False
