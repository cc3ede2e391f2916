"""An optimizer wrapper that perturbs the layers whose adapters it trains."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from .. import checks
from ..layers.view import LoRALayer, lora_layers, refuse_fsdp1, seen_through
from ..wrapper import OptimizerWrapper, wrappers_of
from .attachment import AttachedModules, Attachment, attachments
from .bypass import Watch, held_ids
from .passes import would_perturb
from .source import Source

logger = logging.getLogger("flatlora")

SAMPLES = 50  # steps after which a warning says that the perturbation does nothing to the loss, or much
NOTHING, MUCH = 2e-3, 0.5  # in the units of the loss

_P = TypeVar("_P", bound="PerturbingOptimizer")


class PerturbingOptimizer(OptimizerWrapper):
    """Owns the attachment of its source to the model, and with it the life of the perturbation.

    A copy of the optimizer, made together with its model, is attached to the copy of the model. An optimizer built over
    adapters that another of its kind has trained takes them over; the other one's next step raises.

    A method's constructor sets `_model`, `_adapter` and `_source`, over the layers of `trained_by`, and calls
    `reattach`. A method with other layers overrides `reattach` and `groups_changed`.
    """

    _strength = "rho"  # the name of the number that says how large ε is
    _model: nn.Module
    _adapter: str | Iterable[str] | None
    _source: Any
    _attachment: Any
    _watch: Any

    def __init__(self, optimizer: Optimizer):
        super().__init__(optimizer)
        # Of the instance: a default of the class would hide them from classes that others derive, as Lightning does.
        self._source = self._attachment = self._watch = None

    @classmethod
    def for_model(
        cls: type[_P],
        model: nn.Module,
        optimizer_cls: Callable[..., Optimizer],
        *,
        params: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> _P:
        """Builds the base optimizer over the model, and this one around it.

        Args:
            model: the model with adapters.
            optimizer_cls: makes the base: ``optimizer_cls(params, **kwargs)``.
            params: parameters or parameter groups of the base; by default all parameters that require a gradient.
            kwargs: the method's own options, by the names of its constructor; all others are `optimizer_cls`'s.

        Raises:
            TypeError: `optimizer_cls` is no class, or does not know one of `kwargs`.
            ValueError: as the constructor.

        Example:
            >>> optimizer = GGPOOptimizer.for_model(model, torch.optim.AdamW, lr=3e-4, sigma=0.2)
        """
        checks.optimizer_cls(optimizer_cls)
        own = {name: kwargs.pop(name) for name in inspect.signature(cls).parameters if name in kwargs}
        method: Any = cls  # whose constructor takes the model
        return method(optimizer_cls(trainable(model) if params is None else params, **kwargs), model, **own)

    def attach(self, source: Source, all_trained: bool = True) -> None:
        """Attaches `source` to its layers; `all_trained`: they are all that the optimizer is to train.

        A ValueError of `claim` leaves nothing attached.
        """
        claim(source, list(source.layers.values()), self.base_optimizer)
        self._source, self._attachment = source, Attachment(self._model, source)
        self._watch = Watch(self._kind, self._model, self.base_optimizer, self._attachment, all_trained)

    def reattach(self) -> None:
        """Attaches the source of a copied optimizer to the layers of its own model."""
        self.attach(self._source, all_trained=self._adapter is None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base optimizer's. GGPO and LoRASAM perturb adapters whose parameters come in from then on.

        Raises:
            ValueError: the method refuses them; the group has been taken out again.
        """
        super().add_param_group(param_group)
        try:
            self.groups_changed()
        except ValueError:
            refused = self.param_groups.pop()["params"]
            for inner in wrappers_of(self.base_optimizer):
                if isinstance(inner, PerturbingOptimizer):
                    inner.drop_parameters({id(p) for p in refused})
            raise
        if self._watch is not None:
            self._watch.known = self._watch.known | held_ids(True, self.base_optimizer)

    def drop_parameters(self, params: set[int]) -> None:
        """Undoes `groups_changed` for parameters, by identity, that are no longer in the groups."""
        if not self._attached:
            return
        known = self._source.layers
        for layer in list(known.values()):
            gone = {a.name for a in layer.all_adapters() if any(id(p) in params for p in a.params)}
            layer.names -= gone
            if not layer.names:
                self._attachment.drop(known.pop(layer.name))
        self._watch.known = self._watch.known - params
        self._watch.note_groups(all_trained=self._adapter is None)

    def groups_changed(self) -> None:
        """Called when parameters have come into the groups; ValueError refuses them."""
        if not self._attached:
            return
        known, new = self._source.layers, []
        for layer in held_layers(lora_layers(self._model, self._adapter), self._adapter, self.base_optimizer):
            if names := layer.names - (known[layer.name].names if layer.name in known else set()):
                new.append(seen_through(layer, names))
        claim(self._source, new, self.base_optimizer)
        for layer in new:
            if layer.name in known:
                known[layer.name].names |= layer.names
            else:
                known[layer.name] = layer
                self._attachment.add(layer)
        self._watch.note_groups(all_trained=self._adapter is None)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        attachment, watch = self._attachment, self._watch
        if attachment is not None and attachment.superseded:
            raise RuntimeError(
                f"a {self._kind} that was built later perturbs this model now; step that one, or build a new optimizer"
            )
        if not self._attached:
            return super().step(closure, **kwargs)
        if not attachment.used:
            # Both may have come after this optimizer.
            refuse_fsdp1(self._model)
            self.check_first_step()
        if watch.found_new_parameters():
            self.groups_changed()
        attachment.used = watch.stepping = True
        watch.checked = False
        try:
            loss = super().step(closure, **kwargs)
        finally:
            watch.stepping = False
        if closure is not None and not watch.checked:
            name = type(self.base_optimizer).__name__
            watch.warn_once("closure", f"{name} did not call its closure, so the {self._kind} saw no gradients")
        return loss

    def check_first_step(self) -> None:
        """Called when the first step begins; an error refuses it."""

    def before_step(self) -> None:
        if self._attached:
            self._watch.check_parameters()
            self._watch.check_passes()
            self._source.read_rise()

    def after_step(self) -> None:
        self._source.next_step()
        if self._source.rise.samples == SAMPLES and self._attached:
            mean, error = map(float, self._source.rise.mean())  # the one time that the host waits for it
            if mean == error == 0:  # no step's rise was finite
                return
            much = abs(mean) - 2 * error > MUCH
            if much or abs(mean) + 2 * error < NOTHING:
                what = "much: training may suffer" if much else "next to nothing on this model"
                self._watch.warn_once(
                    "rise",
                    f"over {SAMPLES} steps the perturbation raised the loss by {mean:.1g} ± {error:.1g}; for a loss "
                    f'near 1 that is {what}, and {self.way_out(much)} (watch metrics()["loss_rise"])',
                )

    def way_out(self, much: bool) -> str:
        """What to do about a rise that is too large, or too small."""
        return f"a {'smaller' if much else 'larger'} {self._strength} is worth a try"

    def zero_grad(self, set_to_none: bool = True, **kwargs: Any) -> None:
        super().zero_grad(set_to_none, **kwargs)
        if self._source is not None:
            self._source.rise.forget()  # as the gradients of a step that was skipped

    def miss_gradients(self, effect: str) -> None:
        """Warns of a step without adapter gradients and its `effect`; RuntimeError where none will ever come."""
        self.refuse_replaced()
        self._watch.warn_once("gradients", f"step() found no adapter gradients: {effect}")

    def refuse_replaced(self, *ways_out: str) -> None:
        """RuntimeError if the groups hold others' tensors and no perturbed adapter."""
        layers = list(self._source.layers.values())
        if self._watch.holds_foreign_tensors() and not held_layers(layers, True, self.base_optimizer):
            self.refuse_foreign_tensors(*ways_out)

    def refuse_foreign_tensors(self, *ways_out: str) -> None:
        ways = ["ZeRO stage 0 in float32 (of adapters alone, stages 1 and 2 save little)", "DDP", "FSDP2", *ways_out]
        raise RuntimeError(
            f"the adapters' parameters are no longer in the groups of the {self._kind}: copies stand in their "
            "place, as under DeepSpeed's ZeRO and its fp16 and bf16 modes, and gradients are not as a step will take "
            "them. Use " + ", or ".join(ways)
        )

    def remove(self) -> None:
        """Takes the perturbation off the model. Idempotent; the optimizer goes on as its base optimizer."""
        if self._attachment is not None:
            self._attachment.remove()

    def __getattr__(self, name: str) -> Any:
        if name in ("first_step", "second_step") and self._attached:
            raise AttributeError(
                f"{name}() of the {type(self.base_optimizer).__name__} goes past the {self._kind} around it; call "
                "step(closure), which runs both steps within the method"
            )
        return super().__getattr__(name)

    def current_perturbation(self) -> Any:
        """The ε that each layer sees in this step, by layer name; None where it sees none."""
        if self._attachment is None:
            return {}
        source = self._source
        seen = [(layer, layer.adapters()) for layer in self._attachment.layers]
        return {one.name: source.given(one, a) if would_perturb(source, one, a) else None for one, a in seen}

    @contextmanager
    def perturbed_as(self, perturbation: Any) -> Iterator[None]:
        """Within the context layers see these ε, whatever the step and the weights have become."""
        if self._attachment is None:
            yield
            return
        source = self._source
        before = source.fixed, source.replaying
        try:
            source.fixed, source.replaying = perturbation, True
            yield
        finally:
            source.fixed, source.replaying = before

    def unperturbed(self) -> AbstractContextManager[None]:
        return self.perturbed_as({})

    def layer_identities(self) -> dict[str, dict[str, Any]]:
        """What must be so of each layer in a checkpoint's model and in this one."""
        return {a.name: {"shape": list(a.shape), "ranks": a.ranks()} for a in self._source.layers.values()}

    def check_layer_states(self, method: str, layers: Any, *fields: str) -> None:
        """ValueError unless a checkpoint's `layers` are this model's, with their identities and `fields` in each."""
        if not isinstance(layers, Mapping) or not all(isinstance(layer, Mapping) for layer in layers.values()):
            raise ValueError(
                f"the state_dict's {method} part has no dict by layer name; load one that this library wrote"
            )
        ours = self.layer_identities()
        theirs = {name: {key: layer.get(key) for key in ("shape", "ranks")} for name, layer in layers.items()}
        checks.same_layers("adapted layers", theirs, ours)
        for layer in layers.values():
            checks.state_fields(method, layer, *fields)

    def take_over(self, state: dict[str, Any], *settings: str) -> None:
        """Sets settings to the checkpoint's, as a learning rate is, with a warning for those that change."""
        for name in settings:
            if (ours := getattr(self, name)) != state[name]:
                logger.warning("resumed with the checkpoint's %s = %g, not %g", name, state[name], ours)
            setattr(self, name, state[name])

    @property
    def _attached(self) -> bool:
        return bool(self._attachment is not None and self._attachment.layers)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_attachment": None, "_watch": None, "_was_attached": self._attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_was_attached")
        super().__setstate__(state)
        if attached:
            self.reattach()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, but for an earlier optimizer's auxiliary; ValueError without any."""
    left = {p for module in model.modules() if isinstance(module, AttachedModules) for p in module.parameters()}
    if found := [p for p in model.parameters() if p.requires_grad and p not in left]:
        return found
    raise ValueError(f"no parameter of the {type(model).__name__} requires a gradient; {checks.UNFREEZE}")


def claim(source: Source, layers: list[LoRALayer], optimizer: Optimizer) -> None:
    """Takes adapters that `source` is to perturb from other sources of its kind, whose optimizers can't step then.

    ValueError if an optimizer that `optimizer` wraps, or one that has not stepped yet, perturbs one of them.
    """
    inner = [wrapper._attachment for wrapper in wrappers_of(optimizer) if isinstance(wrapper, PerturbingOptimizer)]
    others: list[Attachment] = []
    for layer in layers:
        for other, theirs in attachments(layer.module):
            alike = type(other.source) is type(source) and not other.source.always
            if not alike or not theirs.names & layer.names or other in others:
                continue
            if other in inner or not other.used:
                whose = "that the given one wraps" if other in inner else "that has not stepped yet"
                one_each = (
                    ". The given one holds a single parameter: one optimizer for each, stepped within backward, is not "
                    "supported, as a step needs the gradients of all layers; build one over all of them"
                )
                raise ValueError(
                    f"layer {layer.name!r} is already perturbed by an optimizer of this kind {whose}; call remove() on "
                    "that optimizer, or flatlora.remove_perturbation(model) if it is out of reach, and then build this "
                    f"one{one_each if len(held_ids(True, optimizer)) == 1 else ''}"
                )
            others.append(other)
    for other in others:
        logger.warning("the optimizer that perturbed this model is superseded by a new one, and can't step any more")
        other.remove()
        other.superseded = True


def trained_by(model: nn.Module, adapter: str | Iterable[str] | None, optimizer: Optimizer) -> list[LoRALayer]:
    """The adapted layers of `model`, seen through the adapters that the optimizer trains.

    Those are the adapters that it holds parameters of; with ``adapter=None`` they must require a gradient too, which
    leaves out frozen ones, such as a reference policy's, that came with ``model.parameters()``. ValueError without any.
    """
    layers = lora_layers(model, adapter)
    found, held = held_layers(layers, adapter, optimizer), held_ids(adapter, optimizer)
    if not found:
        adapters = [a for layer in layers for a in layer.all_adapters()]
        if not any(adapter.trained for adapter in adapters):
            raise ValueError(f"the adapters of all {len(layers)} adapted layers are frozen; {checks.UNFREEZE}")
        raise ValueError(
            f"{type(optimizer).__name__} holds {len(held)} parameters and none of them is an adapter's lora_A or "
            f"lora_B of the {len(layers)} adapted layers found (first: {layers[0].name!r}); build it from "
            "[p for p in model.parameters() if p.requires_grad] of this model, after the adapters were added"
        )
    return found


def held_layers(layers: list[LoRALayer], adapter: Any, optimizer: Optimizer) -> list[LoRALayer]:
    """The layers with adapters that the optimizer trains at present, seen through these."""
    held = held_ids(adapter, optimizer)
    trained = [{a.name for a in layer.all_adapters() if any(id(p) in held for p in a.params)} for layer in layers]
    return [seen_through(layer, names) for layer, names in zip(layers, trained, strict=True) if names]
