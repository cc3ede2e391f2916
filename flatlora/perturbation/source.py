"""What decides the ε of layers, and what it knows of the passes that saw it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ..kernels.draw import Draw
from ..layers.adapter import Adapter
from ..layers.view import LoRALayer
from .rise import LossRise

Names = tuple[str, ...]


class Source:
    """Decides the ε of layers. A method derives from it and overrides `draw`.

    Attributes:
        layers: those that it perturbs, by name.
        always: perturb in eval mode, in passes without gradients and under merged adapters too: for measuring.
        no_grad: perturb passes in train mode that record no gradients too.
        replaying: perturb beside adapters that require no gradient now, as a pass is run again as it was.
        fixed: by layer, the ε that it gets instead of `draw`'s; None for `draw`'s.
        passes: of the passes with gradients since the last step, by layer, then by the names in `LoRALayer.names` that
            a pass added: the scaling of every adapter that it added, as some models change that for a pass alone.
        acted: the layers that the last step's passes went through.
        skipped: layers with a pass in train mode since the last step that had no gradients and no perturbation.
        warned_of_two_passes: whether the user was warned that a perturbed pass came after such a one.
        rise: how far ε raises the loss.
    """

    always = False
    no_grad = False
    replaying = False

    def __init__(self, layers: Iterable[LoRALayer]):
        self.layers = {layer.name: layer for layer in layers}
        self.fixed: dict[str, Draw | Adapter | None] | None = None
        self.passes: dict[str, dict[Names, dict[str, float]]] = {}
        self.acted: frozenset[str] = frozenset()
        self.skipped: set[str] = set()
        self.warned_of_two_passes = self._keeping = False
        self.rise = LossRise()

    def graph_kind(self, layer: LoRALayer) -> Literal["gaussian"] | tuple[tuple[int, ...], tuple[int, ...]] | None:
        """What ε is at every step of a compiled graph: Gaussian, or factors B and A of these shapes.

        None where `draw` can be traced instead, as it gives the same parameters at every step.
        """
        return None

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Draw | Adapter | None:
        """The ε of this forward of `layer`, random (`Draw`) or not (`Adapter`); None for none. One ε for a whole step.

        An adapter whose factors require gradients gets them. One made of a grid of blocks must not require any.
        `adapters`: what ``layer.adapters()`` has just returned, if the caller has it.
        """
        raise NotImplementedError

    def given(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Draw | Adapter | None:
        """The ε that `layer` gets at present where it is perturbed."""
        if self.fixed is None:
            return self.draw(layer, adapters)
        if self._keeping and layer.name not in self.fixed:
            self.fixed[layer.name] = self.draw(layer, adapters)
        return self.fixed.get(layer.name)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the context a layer keeps the first ε that it gets, wherever its weights are moved."""
        before = self.fixed, self._keeping
        if self.fixed is None:
            self.fixed, self._keeping = {}, True
        try:
            yield
        finally:
            self.fixed, self._keeping = before

    def measures(self, layer: LoRALayer) -> bool:
        """Whether backward is to record what the layer's ε of this step does to the loss."""
        return not (self.always or self.replaying)

    def note_pass(self, layer: LoRALayer, adapters: list[Adapter]) -> None:
        """Called in each pass that is perturbed and records gradients."""
        scalings = {adapter.name: adapter.scaling for adapter in adapters}
        self.passes.setdefault(layer.name, {})[held_names(layer, adapters)] = scalings

    def acts_on(self, layer: LoRALayer) -> bool:
        """Whether a pass that trains has gone through the layer since the last step."""
        return layer.name in self.passes

    def with_gradients(self, layers: Iterable[LoRALayer] | None = None) -> dict[Names, dict[str, list[Adapter]]]:
        """By layer, the adapters that this step's passes added to it; of layers with gradients, of these or all.

        Passes that added different adapters are kept apart, by these adapters' names, as each has its own gradient. A
        layer without a pass, whose gradients were set by hand, has all adapters with a gradient.
        """
        found: dict[Names, dict[str, list[Adapter]]] = {}
        for layer in self.layers.values() if layers is None else layers:
            for names, scalings in self.passes.get(layer.name, {(): {}}).items():
                adapters = layer.adapters_named(scalings) if names else [a for a in layer.all_adapters() if a.has_grads]
                if any(a.has_grads and a.name in layer.names for a in adapters):
                    found.setdefault(names or held_names(layer, adapters), {})[layer.name] = adapters
        return found

    def read_gradients(self) -> bool:
        """Reads what the next step's ε needs of the gradients; returns whether there are any."""
        return True

    def read_rise(self) -> None:
        """Takes from the backward passes of this step how far ε raised the loss."""
        self.rise.read()

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` needs to undo what passes and a step leave here."""
        passes = {layer: dict(scalings) for layer, scalings in self.passes.items()}
        return passes, self.acted, set(self.skipped), self.rise.snapshot()

    def restore(self, passes: Any, acted: Any, skipped: Any, rise: Any) -> None:
        self.passes, self.acted, self.skipped = passes, acted, skipped
        self.rise.restore(rise)

    def next_step(self) -> None:
        self.rise.advance()
        self.acted = frozenset(name for name, layer in self.layers.items() if self.acts_on(layer))
        self.passes = {}
        self.skipped = set()


def held_names(layer: LoRALayer, adapters: Iterable[Adapter]) -> Names:
    """The names of `adapters` that the layer is seen through."""
    return tuple(dict.fromkeys(adapter.name for adapter in adapters if adapter.name in layer.names))
