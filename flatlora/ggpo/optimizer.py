"""LoRA-GGPO: train under weight noise whose rows follow the size of the weights and of their gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ..kernels.draw import Draw
from ..layers.bnb import hold_training_layout
from ..layers.view import LoRALayer, lora_layers
from ..perturbation import Perturbation, stacked
from ..streams import shared_seed
from ..wrapper import OptimizerWrapper
from .noise import RowNoise
from .rows import Rows

__all__ = ["GGPOOptimizer"]

logger = logging.getLogger("flatlora")


class GGPOOptimizer(OptimizerWrapper):
    """Wraps any optimizer; between two of its steps the model trains at ``W' + ε`` instead of ``W'``.

    Following LoRA-GGPO (arXiv:2502.14538, Eq. 6-8), each adapted layer draws one ε (m, n) per optimizer step, with rows

        ε_i ~ N(0, σ²/n · (‖W'_i‖² + β·‖G_i‖²) · I)

    where ``W' = W0 + s·B·A`` and G is the last step's weight gradient, which LoRA never forms. ``‖W'_i‖`` is exact; for
    ``‖G_i‖`` stands the norm of row i of G's orthogonal projection on the tangent space ``{B·X + Y·A}``, all of G that
    the gradients of A and B determine. With ``beta=0`` this is the noise of Flat-LoRA (arXiv:2409.14396). In eval mode,
    with adapters disabled, and wherever another adapter than the optimized ones is active, layers are not perturbed.

    Gradients are read in `step()`, as it finds them: summed over micro-batches, unscaled and clipped.

    Args:
        optimizer: the built base optimizer; it must hold adapter parameters of `model`.
        model: the model with adapters, before or after DDP or FSDP wrap it.
        sigma: σ, noise per row relative to the row's norm. 0 switches the method off. May be set between steps.
        beta: β, weight of the squared gradient norm.
        noise: ``"gaussian"``, independent in every element; or ``"low_rank"``, ``diag(d)·U·V/√noise_rank``: the same
            covariance at the cost of an adapter of that rank, but heavier tails and a larger spread of the loss.
        noise_rank: rank of ``"low_rank"`` noise.
        adapter: name or names of the adapters; None for all whose parameters `optimizer` holds.
        seed: of the private noise generator; by default torch's initial seed, rank 0's when distributed.

    Raises:
        ValueError: a bad number or name, no adapted layer, an optimizer without adapter parameters, a model that
            another `GGPOOptimizer` perturbs. Nothing has been attached then.
        TypeError: `optimizer` or `model` is of the wrong type.

    Example:
        >>> optimizer = GGPOOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), model)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        sigma: float = 0.03,
        beta: float = 0.01,
        noise: Literal["gaussian", "low_rank"] = "gaussian",
        noise_rank: int = 8,
        adapter: str | Iterable[str] | None = None,
        seed: int | None = None,
    ):
        super().__init__(optimizer)
        sigma, beta = _non_negative("sigma", sigma), _non_negative("beta", beta)
        if noise not in ("gaussian", "low_rank"):
            raise ValueError(f"noise must be 'gaussian' or 'low_rank', got {noise!r}")
        if not isinstance(noise_rank, int) or noise_rank < 1:
            raise ValueError(f"noise_rank must be an integer >= 1, got {noise_rank!r}")
        layers = _trained(lora_layers(model, adapter), optimizer)
        for layer in layers:
            if any(
                isinstance(other.source, RowNoise) and not other.source.everywhere for other in stacked(layer.module)
            ):
                raise ValueError(
                    f"layer {layer.name!r} is already perturbed by a GGPOOptimizer; call remove() on that optimizer, "
                    "or flatlora.remove_perturbation(model) if it is gone, and then build this one"
                )
        seed = shared_seed() if seed is None else int(seed)
        self._model, self._adapter = model, adapter
        self._noise = RowNoise([], sigma, beta, noise, noise_rank, seed)
        self._perturbations: list[Perturbation] = []
        self._layout = hold_training_layout(model)
        self._attach(layers)

    def _attach(self, layers: list[LoRALayer]) -> None:
        for layer in layers:
            if layer.name in self._noise.rows:
                self._noise.rows[layer.name].layer.names = layer.names
            else:
                self._noise.rows[layer.name] = Rows(layer)
                self._perturbations.append(Perturbation(layer, self._noise))
                self._perturbations[-1].attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base optimizer's; adapters whose parameters come in are perturbed from then on."""
        super().add_param_group(param_group)
        self._attach(_trained(lora_layers(self._model, self._adapter), self.base_optimizer))

    # --- the method: a step looks at the gradients, moves the parameters, and goes on to the next ε ---------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As the base optimizer's. All evaluations of a `closure` see one ε, wherever they move the parameters."""
        with nullcontext() if closure is None else self.perturbed_as(self.current_perturbation()):
            return super().step(closure)

    def before_step(self) -> None:
        if self._noise.sigma > 0 and self._noise.beta > 0:
            self._noise.observe_gradients()

    def after_step(self) -> None:
        self._noise.next_step()

    def row_std(self) -> dict[str, Tensor]:
        """The standard deviation of each row's noise at present, per element: ``{layer name: (m,) tensor}``."""
        return {name: self._noise.std(rows).clone() for name, rows in self._noise.rows.items()}

    @property
    def sigma(self) -> float:
        """σ; a change is felt at the next forward."""
        return self._noise.sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._noise.sigma = _non_negative("sigma", value)

    @property
    def beta(self) -> float:
        """β; a change is felt at the next forward."""
        return self._noise.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._noise.beta = _non_negative("beta", value)

    # --- switching it off and on ----------------------------------------------------------------------------------

    def train(self) -> None:
        """Perturb again after `eval()`, in layers that are in train mode themselves. Accelerate calls it."""
        self._switch(True)

    def eval(self) -> None:
        """Perturb nothing until `train()`, whatever the mode of the model. Accelerate calls it."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        self._noise.on = on
        forward_to = getattr(self.base_optimizer, "train" if on else "eval", None)
        if callable(forward_to):
            forward_to()

    def current_perturbation(self) -> dict[str, Draw | None]:
        """The ε that each layer sees in this step, by layer name; None where it sees none."""
        return {name: self._noise.draw(rows.layer) for name, rows in self._noise.rows.items()}

    @contextmanager
    def perturbed_as(self, perturbation: dict[str, Draw | None]) -> Iterator[None]:
        """Within the context layers see these ε, whatever the step and the weights have become."""
        held, self._noise.held = self._noise.held, perturbation
        try:
            yield
        finally:
            self._noise.held = held

    def unperturbed(self) -> AbstractContextManager[None]:
        return self.perturbed_as({})

    def remove(self) -> None:
        """Takes everything off the model. Idempotent; the optimizer goes on as its base optimizer."""
        for perturbation in self._perturbations:
            perturbation.remove()
        self._layout.release()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        noise = self._noise
        layers = {
            name: {
                "shape": list(rows.layer.shape),
                "ranks": rows.ranks(),
                "grad_sq": None if rows.grad_sq is None else rows.grad_sq.clone(),  # of a tensor of many layers
            }
            for name, rows in noise.rows.items()
        }
        form = [noise.kind, noise.rank]
        numbers = {"seed": noise.seed, "step": noise.step, "sigma": noise.sigma, "beta": noise.beta}
        return {**numbers, "form": form, "layers": layers}

    def check_method_state(self, state: dict[str, Any]) -> None:
        theirs, ours = state["layers"], self.method_state()["layers"]
        if theirs.keys() != ours.keys():
            odd = sorted(theirs.keys() ^ ours.keys())
            raise ValueError(
                f"the state_dict is of another model: it has {len(theirs)} adapted layers, this one {len(ours)}; found "
                f"in one alone: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}. Load the checkpoint that was "
                "saved with this model's adapters"
            )
        for name, own in ours.items():
            found = theirs[name]
            if any(found[key] != own[key] for key in ("shape", "ranks")):
                raise ValueError(
                    f"the state_dict is of another model: layer {name!r} is {found['shape']} with ranks "
                    f"{found['ranks']} in it and {own['shape']} with ranks {own['ranks']} here"
                )

    def load_method_state(self, state: dict[str, Any] | None) -> None:
        # σ and β are the checkpoint's from here on, as the learning rate is; the form of the noise is this optimizer's.
        noise = self._noise
        if state is None:
            logger.warning("the checkpoint has no GGPO part: the noise starts afresh, without a gradient term")
            noise.step = 0
        else:
            if state["form"] != [noise.kind, noise.rank]:
                logger.warning(
                    "resumed with %s noise of rank %d; the checkpoint had %s of %d",
                    noise.kind,
                    noise.rank,
                    *state["form"],
                )
            noise.seed, noise.step = state["seed"], state["step"]
            noise.sigma, noise.beta = state["sigma"], state["beta"]
        for name, rows in noise.rows.items():
            grad_sq = None if state is None else state["layers"][name]["grad_sq"]
            rows.grad_sq = None if grad_sq is None else grad_sq.to(rows.layer.base.device, copy=True)
            rows.cached = None


def _non_negative(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def _trained(layers: list[LoRALayer], optimizer: Optimizer) -> list[LoRALayer]:
    """The layers seen through the adapters that the optimizer trains."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = []
    for layer in layers:
        names = {a.name for a in layer.all_adapters() if id(a.A_param) in held or id(a.B_param) in held}
        if names:
            found.append(LoRALayer(layer.name, layer.module, layer.base, frozenset(names)))
    if not found:
        raise ValueError(
            f"{type(optimizer).__name__} holds {len(held)} parameters and none of them is an adapter's lora_A or "
            f"lora_B of the {len(layers)} adapted layers found (first: {layers[0].name!r}); build it from "
            "[p for p in model.parameters() if p.requires_grad] of this model, after the adapters were added"
        )
    return found
