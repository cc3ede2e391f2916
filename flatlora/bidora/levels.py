"""Two built optimizers as one: what schedulers, Accelerate, checkpoints and logging see of a bi-level method."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .. import checks
from ..wrapper import STATE_KEY, Method, check_base_state, load_base, saved_groups, wrappers_of
from .passes import parameters_of


class TwoLevels(Method, Optimizer):
    """The plumbing of an optimizer over two others; a method derives from it and overrides `step` and `Method`'s.

    `param_groups` are the lower's then the upper's, the groups themselves, looked up at every access: what a scheduler
    writes into one reaches its level. `state_dict()` has the form of an ordinary optimizer's over these groups.
    """

    lower: Optimizer
    upper: Optimizer
    _kind: str

    def __init__(self, lower: Optimizer, upper: Optimizer):
        checks.built_optimizer("lower", lower)
        checks.built_optimizer("upper", upper)
        # Not Optimizer.__init__, which would make groups and state of its own; __setstate__ makes the hooks alone.
        # Lightning derives a class of its own from ours, for an object with this one's attributes: so the name is one.
        Optimizer.__setstate__(self, {"lower": lower, "upper": upper, "_kind": type(self).__name__})

    def __getstate__(self) -> dict[str, Any]:
        # As of torch's optimizers, neither hooks nor what a scheduler or Accelerate patched in.
        foreign = {key for key in self.__dict__ if key in ("step", "_opt_called") or key.startswith("_optimizer_")}
        return {key: value for key, value in self.__dict__.items() if key not in foreign}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [*self.lower.param_groups, *self.upper.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The per-parameter states of both levels; the mapping is new at each access, the states are theirs."""
        return {**self.lower.state, **self.upper.state}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.lower.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused by a NotImplementedError: a group belongs to a level."""
        raise NotImplementedError(
            "which of the two levels is the group for? Call optimizer.lower.add_param_group(group) or "
            "optimizer.upper.add_param_group(group)"
        )

    def inner_optimizers(self) -> list[Optimizer]:
        return [self.lower, self.upper]

    def make_states(self) -> Any:
        """A step of both levels alone, for `only_initialises`."""
        for level in self.inner_optimizers():
            level.step()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``state`` and ``param_groups`` numbered through both levels, and ``["flatlora"][class name]``.

        A level whose `state_dict()` has another form is in the latter as it is, and of the former has its groups alone.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        own: dict[str, Any] = {"shapes": shapes_of(self), "own": self.method_state()}
        merged: dict[str, Any] = {"state": {}, "param_groups": [], STATE_KEY: {self._kind: own}}
        for name, level in (("lower", self.lower), ("upper", self.upper)):
            state, offset = level.state_dict(), _count(merged["param_groups"])
            if {"state", "param_groups"} <= state.keys():
                own[name] = _rest(state)
            else:
                own["of_own_form"], own[name] = [*own.get("of_own_form", ()), name], state
                state = {"state": {}, "param_groups": _numbered_groups(level)}
            merged["state"] |= {offset + i: one for i, one in state["state"].items() if isinstance(i, int)}
            merged["param_groups"] += _shifted(state["param_groups"], offset)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            merged = post_hook(self, merged) or merged
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both levels and the method.

        Raises:
            ValueError: the state is incomplete, or was of another kind of optimizer or of another model. Nothing has
                changed then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self.check_state_dict(state_dict)
        levels = self.inner_optimizers()
        before = [copy.deepcopy(level.state_dict()) for level in levels]
        try:
            for level, state in zip(levels, self._split(state_dict), strict=True):
                load_base(level, state)
        except BaseException:  # of a base optimizer's own checks
            for level, state in zip(levels, before, strict=True):
                level.load_state_dict(state)
            raise
        self.load_method_state(state_dict[STATE_KEY][self._kind]["own"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if a level or the method would refuse the state. Changes nothing."""
        name = self._kind
        own = state_dict.get(STATE_KEY, {}).get(name)
        if own is None:
            raise ValueError(
                f"the state_dict was not written by {name}; one level's goes to optimizer.lower or optimizer.upper"
            )
        checks.state_fields("optimizer", state_dict, "state", "param_groups")
        checks.state_fields(name, own, "lower", "upper", "shapes", "own")
        for part in ("lower", "upper"):
            checks.state_fields(f"{name} {part}", own[part])
        _check_groups(state_dict["param_groups"], own["shapes"], self)
        for level, state in zip(self.inner_optimizers(), self._split(state_dict), strict=True):
            _check_wrappers(level, state)
        self.check_method_state(own["own"])

    def _split(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """The states of the lower and of the upper in one of both."""
        own, groups, found = state_dict[STATE_KEY][self._kind], state_dict["param_groups"], []
        cut = len(self.lower.param_groups)
        offset = _count(groups[:cut])
        for name, part, first, end in (("lower", groups[:cut], 0, offset), ("upper", groups[cut:], offset, math.inf)):
            if name in own.get("of_own_form", ()):
                found.append(own[name])
                continue
            state = {i - first: one for i, one in state_dict["state"].items() if first <= i < end}
            state |= own[name].get("state", {})
            found.append({**own[name], "state": state, "param_groups": _shifted(part, -first)})
        return found


def directions_of(lower: Optimizer) -> list[Tensor]:
    """V: what `lower` holds, but for what makes up a perturbation, which is part of the function L_tr."""
    perturbing = {p for wrapper in wrappers_of(lower) for p in wrapper.perturbation_parameters()}
    return [p for p in parameters_of(lower) if p not in perturbing]


def step_sizes(lower: Optimizer, xi: float | str) -> dict[Tensor, Any]:
    """ξ of every parameter that `lower` holds."""
    return {p: group["lr"] if xi == "lr" else xi for group in lower.param_groups for p in group["params"]}


def shapes_of(optimizer: Optimizer) -> list[list[list[int]]]:
    """The shapes of an optimizer's parameters, by group: what tells a model in a checkpoint from another."""
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def check_optimizer_state(state_dict: Any, shapes: Any, optimizer: Optimizer) -> None:
    """ValueError unless the state is of parameters with these shapes, and of the optimizer's kind of wrapper."""
    _check_groups(saved_groups(state_dict), shapes, optimizer)
    _check_wrappers(optimizer, state_dict)


def _check_wrappers(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """ValueError if a wrapper around the base optimizer would refuse the state, or has gone since it was written."""
    if (outermost := next(wrappers_of(optimizer), None)) is not None:
        outermost.check_state_dict(state_dict)
        return
    check_base_state(optimizer, state_dict)
    if methods := state_dict.get(STATE_KEY):
        raise ValueError(
            f"the state_dict was written by {', '.join(methods)} and this optimizer is {type(optimizer).__name__} "
            "alone; build the same optimizer as the checkpoint's before loading"
        )


def _check_groups(groups: list[dict[str, Any]] | None, shapes: Any, optimizer: Optimizer) -> None:
    theirs: Any = [len(group["params"]) for group in groups or ()]
    ours: Any = [len(group["params"]) for group in optimizer.param_groups]
    if groups is None or theirs == ours:
        theirs, ours = shapes, shapes_of(optimizer)
    if theirs != ours:
        raise ValueError(
            f"the state_dict is of another model: the sizes of its groups or parameters are {theirs}, this optimizer's "
            f"{ours}"
        )


def _count(groups: list[dict[str, Any]]) -> int:
    return sum(len(group["params"]) for group in groups)


def _shifted(groups: list[dict[str, Any]], by: int) -> list[dict[str, Any]]:
    return [{**group, "params": [i + by for i in group["params"]]} for group in groups]


def _numbered_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups with numbers for parameters, as torch's `state_dict` has them."""
    numbers = itertools.count()
    return [{**group, "params": [next(numbers) for _ in group["params"]]} for group in optimizer.param_groups]


def _rest(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What is left of a state without groups and what is kept by a parameter's number, as TRAC's state by name."""
    rest = {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}
    named = {key: value for key, value in state_dict["state"].items() if not isinstance(key, int)}
    return {**rest, "state": named} if named else rest
