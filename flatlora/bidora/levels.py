"""Two built optimizers as one: what schedulers, Accelerate, checkpoints and logging see of a bi-level method."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..wrapper import STATE_KEY

__all__ = ["TwoLevels"]


class TwoLevels(Optimizer):
    """The plumbing of an optimizer over two others; a method derives from it and overrides `step` and the own state.

    `param_groups` are the lower's then the upper's, the groups themselves, looked up at every access: what a scheduler
    writes into one reaches its level. `state_dict()` has the form of an ordinary optimizer's over these groups.

    Args:
        lower: a built optimizer.
        upper: another one, with other parameters.

    Raises:
        TypeError: one of them is not a `torch.optim.Optimizer` instance.
    """

    lower: Optimizer
    upper: Optimizer

    def __init__(self, lower: Optimizer, upper: Optimizer):
        for name, level in (("lower", lower), ("upper", upper)):
            if not isinstance(level, Optimizer):
                raise TypeError(f"{name} must be a built torch.optim.Optimizer, such as AdamW(params); got {level!r}")
        # Not Optimizer.__init__, which would make groups and state of its own; __setstate__ makes the hooks alone.
        Optimizer.__setstate__(self, {"lower": lower, "upper": upper})

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.lower.zero_grad(set_to_none=set_to_none)
        self.upper.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a group belongs to a level.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has two levels and can't tell which one the group is for; call "
            "optimizer.lower.add_param_group(group) or optimizer.upper.add_param_group(group)"
        )

    def train(self) -> None:
        """Calls `train()` of the levels that have one, as Accelerate expects of an optimizer."""
        self._tell("train")

    def eval(self) -> None:
        """Calls `eval()` of the levels that have one, as Accelerate expects of an optimizer."""
        self._tell("eval")

    def _tell(self, what: str) -> None:
        for level in (self.lower, self.upper):
            if callable(method := getattr(level, what, None)):
                method()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        """The method's part of the checkpoint: plain Python numbers, strings, dicts and tensors."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes over what `own_state` gave."""

    def state_dict(self) -> dict[str, Any]:
        """``state`` and ``param_groups`` numbered through both levels, and ``["flatlora"][class name]``."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        lower, upper = self.lower.state_dict(), self.upper.state_dict()
        offset = _count(lower["param_groups"])
        own = {"lower": _rest(lower), "upper": _rest(upper), "own": self.own_state()}
        merged = {
            "state": {**lower["state"], **{offset + i: state for i, state in upper["state"].items()}},
            "param_groups": [*lower["param_groups"], *_shifted(upper["param_groups"], offset)],
            STATE_KEY: {type(self).__name__: own},
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            merged = post_hook(self, merged) or merged
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both levels and the method.

        Raises:
            ValueError: the state was of another kind of optimizer or of other groups. Nothing has changed then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        own = state_dict.get(STATE_KEY, {}).get(type(self).__name__)
        if own is None:
            raise ValueError(
                f"the state_dict was not written by {type(self).__name__}; load the state of a level on its own with "
                "optimizer.lower.load_state_dict or optimizer.upper.load_state_dict"
            )
        groups = state_dict["param_groups"]
        theirs, ours = ([len(g["params"]) for g in found] for found in (groups, self.param_groups))
        if theirs != ours:
            raise ValueError(
                f"the state_dict is of another model: its groups have {theirs} parameters, this optimizer's {ours} "
                f"({len(self.lower.param_groups)} of them the lower's)"
            )
        cut = len(self.lower.param_groups)
        offset = _count(groups[:cut])
        state = state_dict["state"]
        lower = {i: s for i, s in state.items() if i < offset}
        upper = {i - offset: s for i, s in state.items() if i >= offset}
        self.lower.load_state_dict({"state": lower, "param_groups": groups[:cut], **own["lower"]})
        self.upper.load_state_dict({"state": upper, "param_groups": _shifted(groups[cut:], -offset), **own["upper"]})
        self.load_own_state(own["own"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _count(groups: list[dict[str, Any]]) -> int:
    return sum(len(group["params"]) for group in groups)


def _shifted(groups: list[dict[str, Any]], by: int) -> list[dict[str, Any]]:
    return [{**group, "params": [i + by for i in group["params"]]} for group in groups]


def _rest(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}
