"""An optimizer and its methods in the checkpoints of `torch.distributed.checkpoint` and of Accelerate."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from . import checks
from .layers.base import full_tensor
from .wrapper import STATE_KEY, Method


class MethodState:
    """The methods' part of an optimizer, for checkpoints that have the base optimizer's part alone.

    Such are those of Accelerate's ``save_state`` under FSDP2. All ranks must take part.

    Args:
        optimizer: the optimizer, as this library made it; Accelerate's wrapper has it as `.optimizer`.

    Raises:
        TypeError: `optimizer` is not of this library.
        ValueError: from loading, as the optimizer's own `load_state_dict`; nothing has changed then.

    Example:
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> accelerator.register_for_checkpointing(MethodState(optimizer.optimizer))
        >>> accelerator.save_state(folder)  # and load_state(folder), after the same preparations
    """

    def __init__(self, optimizer: Optimizer):
        if not isinstance(optimizer, Method):
            raise TypeError(
                f"optimizer must be one of flatlora's, got {type(optimizer).__name__}; if Accelerate or Lightning has "
                "wrapped it, pass its .optimizer"
            )
        self._optimizer: Any = optimizer

    def state_dict(self) -> dict[str, Any]:
        """``{"flatlora": bytes}``, the methods' part."""
        file = io.BytesIO()
        own = self._optimizer.state_dict().get(STATE_KEY, {})
        torch.save(tree_map_only(Tensor, lambda tensor: full_tensor(tensor).detach().cpu(), own), file)
        return {STATE_KEY: file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, on as many processes as there are now."""
        own = self.check_state_dict(state_dict)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), STATE_KEY: own})

    def check_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """The methods' part in `state_dict`, sharded like the optimizer's; ValueError if the optimizer refuses it."""
        checks.state_fields("optimizer", state_dict, STATE_KEY)
        try:
            saved = torch.load(io.BytesIO(state_dict[STATE_KEY]), map_location="cpu", weights_only=True)
        except Exception as reason:  # torch raises a dozen kinds
            raise ValueError(f"the state_dict's {STATE_KEY} part is not the bytes that MethodState wrote") from reason
        ours = self._optimizer.state_dict()
        own = _sharded_as(ours.get(STATE_KEY, {}), saved)
        self._optimizer.check_state_dict({**ours, STATE_KEY: own})
        return own


class CheckpointState:
    """An optimizer of this library as `torch.distributed.checkpoint` (DCP) saves and loads it, methods included.

    DCP's `get_optimizer_state_dict` has the base optimizer's state alone, by the parameters' names, so that any number
    of processes can load it. This is a `Stateful` that adds the methods' part. As always in DCP, all ranks must take
    part.

    Args:
        model: the model, as DDP or FSDP2 have wrapped it.
        optimizer: the optimizer, as this library made it.

    Raises:
        TypeError: `model` is no module, or `optimizer` is not of this library.
        ValueError: from loading, as the optimizer's own `load_state_dict`; nothing has changed then.

    Example:
        >>> state = {"model": get_model_state_dict(model), "optimizer": CheckpointState(model, optimizer)}
        >>> dcp.save(state, checkpoint_id=folder)  # or dcp.async_save
        >>> dcp.load(state, checkpoint_id=folder)  # in a new process, with new objects in `state`
        >>> set_model_state_dict(model, state["model"])
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self._model, self._methods = checks.module(model), MethodState(optimizer)
        self._bases = tuple(_bases(optimizer))

    def state_dict(self) -> dict[str, Any]:
        """``{"base": dict, "flatlora": bytes}``: the base's part by the parameters' names, and the methods'."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        for module in self._model.modules():
            if callable(reshard := getattr(module, "reshard", None)):  # FSDP2 leaves its root whole after evaluation
                reshard()
        # Of the bases: DCP makes a new optimizer's state by a step, which is to be none of the methods'.
        base = get_optimizer_state_dict(self._model, self._bases)
        return {"base": base, **self._methods.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, on as many processes as there are now."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        checks.state_fields("optimizer", state_dict, "base", STATE_KEY)
        self._methods.check_state_dict(state_dict)
        set_optimizer_state_dict(self._model, self._bases, optim_state_dict=state_dict["base"])
        self._methods.load_state_dict(state_dict)


def _bases(optimizer: Optimizer) -> list[Optimizer]:
    if not isinstance(optimizer, Method):
        return [optimizer]
    return [base for inner in optimizer.inner_optimizers() for base in _bases(inner)]


def _sharded_as(ours: Any, value: Any) -> Any:
    """The same with every tensor sharded whose counterpart in `ours` is."""
    if isinstance(value, dict) and isinstance(ours, dict):
        return {key: _sharded_as(ours.get(key), one) for key, one in value.items()}
    if isinstance(value, Tensor) and hasattr(ours, "full_tensor") and value.shape == ours.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(ours.device), ours.device_mesh, ours.placements)
    return value
