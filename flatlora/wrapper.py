"""An optimizer that others use like its base optimizer, and a place for a method around `step()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checks

STATE_KEY = "flatlora"


class Method:
    """What every method has beside its steps: inner optimizers, a part in the checkpoint, and numbers to watch."""

    def method_state(self) -> dict[str, Any]:
        """The method's own part of the checkpoint: plain Python numbers, strings, dicts and tensors."""
        return {}

    def check_method_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if `state` is incomplete or of another model. Must not change anything."""

    def load_method_state(self, state: dict[str, Any] | None) -> None:
        """Takes over what `method_state` gave; None if the checkpoint was written by the base optimizer alone."""

    def inner_optimizers(self) -> list[Optimizer]:
        """The optimizers that this one steps."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True, **kwargs: Any) -> None:
        if not set_to_none:  # the default, and not every optimizer takes the argument, which Accelerate looks for
            kwargs["set_to_none"] = False
        for inner in self.inner_optimizers():
            inner.zero_grad(**kwargs)

    def train(self) -> None:
        """Calls the `train()` of inner optimizers that have one; the method follows the mode of the model."""
        self._set_mode("train")

    def eval(self) -> None:
        """Calls the `eval()` of inner optimizers that have one; the method follows the mode of the model."""
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        for inner in self.inner_optimizers():
            if callable(switch := getattr(inner, mode, None)):
                switch()

    def __copy__(self) -> Any:
        """Another object with the very same attributes; `copy.deepcopy` makes an independent optimizer."""
        copied = object.__new__(type(self))
        copied.__dict__ = self.__dict__
        return copied

    def metrics(self) -> dict[str, Tensor]:
        """The method's few scalars at present, by name, still on their device: reading them is what costs a sync."""
        return {}


def _of_base(name: str) -> property:
    """A property that is the base optimizer's own attribute."""
    return property(
        lambda self: getattr(self.base_optimizer, name), lambda self, value: setattr(self.base_optimizer, name, value)
    )


class OptimizerWrapper(Method, Optimizer):
    """Wraps a built optimizer; schedulers, Accelerate, `GradScaler`, hooks and checkpoints see the base through it.

    `param_groups`, `state` and `defaults` are the base optimizer's own objects, looked up at every access, so
    whatever replaces them (`load_state_dict`, FSDP, Accelerate) is seen at once by both. Attributes the wrapper does
    not have are the base's, and so is its `repr`. Its class is its own: `isinstance` knows the wrapper, and the base
    is `base_optimizer`.

    A method derives from it and overrides `before_step`, `after_step` and what `Method` has. If it perturbs the model,
    it overrides `perturbation_parameters`, `current_perturbation`, `perturbed_as` and `unperturbed` too, by which
    others run a pass again as it was, or without; `PerturbingOptimizer` has the last three.

    Args:
        optimizer: any built `torch.optim.Optimizer`, also another wrapper.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer` instance.
    """

    # A fused base would have GradScaler hand over scaled gradients; methods here read gradients, so the scaler
    # must unscale them first, as it does for every optimizer that does not claim this.
    _step_supports_amp_scaling = False

    # Nor is its class disguised as the base's. Where libraries branch on the kind of an optimizer, a disguise has the
    # wrapper replaced or bypassed in silence: Accelerate does nothing in `step` for LOMO, DeepSpeed builds Adagrad and
    # Muon anew, and Lightning's `self.optimizers()` and torch.distributed.checkpoint look methods up on `__class__`.
    # Undisguised, it misses some refusals (LBFGS under Lightning's AMP, ZeroRedundancyOptimizer with model averaging).
    # Schedulers, GradScaler, FSDP, Trainer, TRL, PEFT and the rest of Accelerate ask for a `torch.optim.Optimizer`.

    base_optimizer: Optimizer
    _kind: str

    def __init__(self, optimizer: Optimizer):
        # Optimizer.__init__ is left out on purpose: it would make a second set of groups, state and hooks.
        self.__dict__["base_optimizer"] = checks.built_optimizer("optimizer", optimizer)
        # Lightning derives a class of its own from ours, for an object with this one's attributes.
        self.__dict__["_kind"] = type(self).__name__

    # --- what a method adds ---------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Called in `step()` once gradients are there and before any parameter moves."""

    def after_step(self) -> None:
        """Called in `step()` after the base optimizer moved the parameters."""

    def inner_optimizers(self) -> list[Optimizer]:
        return [self.base_optimizer]

    def metrics(self) -> dict[str, Tensor]:
        """The method's scalars and, of wrappers within, theirs; see `Method.metrics`."""
        inner = next(wrappers_of(self.base_optimizer), None)
        return {} if inner is None else inner.metrics()

    def _with_inner(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's scalars beside those of wrappers within; a name that they have too begins with the class's."""
        found = OptimizerWrapper.metrics(self)
        return found | {f"{self._kind}.{name}" if name in found else name: value for name, value in own.items()}

    # --- what a method that perturbs the model adds -----------------------------------------------------------------

    def perturbation_parameters(self) -> list[Tensor]:
        """Parameters in `param_groups` that make up the perturbation and are no part of what is trained."""
        return []

    def current_perturbation(self) -> Any:
        """What this method adds to the layers' weights at present, for `perturbed_as`."""
        return None

    def perturbed_as(self, perturbation: Any) -> AbstractContextManager[None]:
        """Within the context the layers see `perturbation`, whatever the step and the weights have become."""
        return nullcontext()

    def unperturbed(self) -> AbstractContextManager[None]:
        """Within the context this method leaves the layers alone."""
        return nullcontext()

    # --- the base optimizer, as others use it ---------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """One step of the base optimizer, with the method around it; further arguments are the base's.

        With a `closure`, `before_step` is called after each evaluation of it.
        """
        if closure is None and only_initialises(self):
            return self.base_optimizer.step(**kwargs)
        if closure is None:
            self.before_step()
            loss = self.base_optimizer.step(**kwargs)
        else:

            def observed() -> Any:
                with torch.enable_grad():
                    loss = closure()
                self.before_step()
                return loss

            loss = self.base_optimizer.step(observed, **kwargs)
        self.after_step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict()` plus the method's part, as ``["flatlora"][class name]``.

        `torch.distributed.checkpoint` keeps the base's part alone; give it a `CheckpointState`.
        """
        state = self.base_optimizer.state_dict()
        own = self.method_state()
        if own:
            state[STATE_KEY] = {**state.get(STATE_KEY, {}), self._state_name(): own}
        return state

    def _state_name(self) -> str:
        """The class's name, with a number where the same method is wrapped again, as over a second model."""
        same = sum(wrapper._kind == self._kind for wrapper in wrappers_of(self.base_optimizer))
        return self._kind + (f".{same}" if same else "")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the base optimizer and the method.

        A checkpoint of the bare base optimizer is accepted: the method then starts afresh and says so in the log.

        Raises:
            ValueError: the state is incomplete, or of another model or method; nothing has been changed then.
        """
        self.check_state_dict(state_dict)
        base_state, own = self._parts(state_dict)
        load_base(self.base_optimizer, base_state)
        self.load_method_state(own)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if a method in the chain of wrappers would refuse the state. Changes nothing."""
        check_base_state(self.base_optimizer, state_dict)
        base_state, own = self._parts(state_dict)
        if own is not None:
            self.check_method_state(own)
        if (inner := next(wrappers_of(self.base_optimizer), None)) is not None:
            inner.check_state_dict(base_state)

    def _parts(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The base optimizer's part of a state and the method's own."""
        methods = dict(state_dict.get(STATE_KEY, {}))
        own = methods.pop(self._state_name(), None)
        base_state = {key: value for key, value in state_dict.items() if key != STATE_KEY}
        if methods:
            if not isinstance(self.base_optimizer, OptimizerWrapper):
                raise ValueError(
                    f"the state_dict was written by {', '.join(methods)}, this optimizer is {self._kind} over "
                    f"{type(self.base_optimizer).__name__}; build the same optimizer as the checkpoint's before loading"
                )
            base_state[STATE_KEY] = methods
        return base_state, own

    param_groups: Any = _of_base("param_groups")
    state: Any = _of_base("state")
    defaults: Any = _of_base("defaults")

    def __getattr__(self, name: str) -> Any:
        if name == "base_optimizer":  # not set yet: while unpickling
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings of wrappers within are set there, where they are read."""
        inner = wrappers_of(self.base_optimizer) if not hasattr(type(self), name) else ()
        if any(isinstance(getattr(type(one), name, None), property) for one in inner):
            setattr(self.base_optimizer, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return repr(self.base_optimizer)

    def __str__(self) -> str:
        return str(self.base_optimizer)

    def __getstate__(self) -> dict[str, Any]:
        # `step` is in the instance when a scheduler or Accelerate patched it; torch's optimizers drop that as well.
        return {key: value for key, value in self.__dict__.items() if key not in ("step", "_opt_called")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def only_initialises(optimizer: Optimizer) -> bool:
    """Whether a step now would have a new optimizer make its state and move nothing: at lr 0, with zero gradients.

    `torch.distributed.checkpoint` takes such a step when it is asked for the state of a new optimizer.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    if optimizer.state or any((isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0 for lr in rates):
        return False
    grads: list[Any] = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Read on the host, but only in a first step, and only where it is taken at lr 0.
    full = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads)
    return bool(grads) and not any(grad.is_sparse or grad.any() for grad in full)


def check_base_state(base: Optimizer, state: Any) -> None:
    """ValueError unless `state` has what torch's `load_state_dict` reads, if `base` loads its state by that.

    Others have states of their own form, such as pytorch_optimizer's `Lookahead`, and check them themselves.
    """
    as_torch = type(base).load_state_dict is Optimizer.load_state_dict
    checks.state_fields("base", state, *(("state", "param_groups") if as_torch else ()))


def load_base(base: Optimizer, state: dict[str, Any]) -> None:
    """The base optimizer's `load_state_dict`, with a ValueError for what its state lacks."""
    try:
        base.load_state_dict(state)
    except KeyError as missing:
        raise ValueError(
            f"the state_dict has no {missing}, which {type(base).__name__} looks for; load one that the same optimizer "
            "wrote"
        ) from missing


def saved_groups(state: Any) -> list[dict[str, Any]] | None:
    """The parameter groups in an optimizer's state, or in that of the optimizer which it wraps; None without any."""
    if not isinstance(state, Mapping):
        return None
    if "param_groups" in state:
        return state["param_groups"]
    return next((found for part in state.values() if (found := saved_groups(part)) is not None), None)


def wrappers_of(optimizer: Optimizer) -> Iterator[OptimizerWrapper]:
    """The wrappers around a base optimizer, outermost first."""
    level: Any = optimizer
    while isinstance(level, OptimizerWrapper):
        yield level
        level = level.base_optimizer
