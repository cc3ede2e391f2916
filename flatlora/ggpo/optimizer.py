"""LoRA-GGPO: train under weight noise whose rows follow the size of the weights and of their gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..perturbation.optimizer import PerturbingOptimizer, trained_by
from ..perturbation.rise import check_rise
from ..streams import shared_seed
from .noise import RowNoise

logger = logging.getLogger("flatlora")


class GGPOOptimizer(PerturbingOptimizer):
    """Wraps any optimizer; between two of its steps the model trains at ``W' + ε`` instead of ``W'``.

    Following LoRA-GGPO (arXiv:2502.14538, Eq. 6-8), each adapted layer draws one ε (m, n) per optimizer step, with rows

        ε_i ~ N(0, σ²/n · (‖W'_i‖² + β·‖G_i‖²) · I)

    where ``W' = W0 + s·B·A`` and G is the last step's weight gradient, which LoRA never forms. For ``‖G_i‖`` stands the
    norm of row i of G's orthogonal projection on the tangent space ``{B·X + Y·A}``, all of G that the gradients of A
    and B determine. With ``beta=0`` this is the noise of Flat-LoRA (arXiv:2409.14396). Both norms, which cost more than
    the noise, are looked at in every eighth step; see `update_every`.
    `flatlora.reference.ggpo_step` is the method in a few lines.

    A layer is perturbed in the passes that train it and in no other: in train mode, while gradients are recorded, and
    while an adapter that the optimizer holds and that requires a gradient is active. Evaluation, generation, reference
    adapters, copies of the model and merged weights never see ε, which goes when the optimizer goes.

    Gradients are read in `step()`, as it finds them: summed over micro-batches, unscaled and clipped.

    What is approximate. The formula follows the paper as others cite it. On a small trained model the rank
    correlation of the projection's row norms with those of G was 0.67, that of the usual ``s·(B·g_A + g_B·A)``
    0.45. Above r = 16 they are those of 32 directions of the projection, near the leading ones. A layer with DoRA,
    with an unknown base or with hooks on its parts, as every `device_map` over two devices puts there, runs its own
    forward and gets ``x·εᵀ`` beside it, which under Gaussian noise is a second large product. Int8 layers under
    Gaussian noise compute with the dequantised weight; bitsandbytes' rounding of activations is left out. On a CPU
    Gaussian noise is drawn four elements at a time from a table (kurtosis 2.9953, none beyond 3.85 σ); on GPUs it
    is torch's, and the same on GPUs of one model.

    Args:
        optimizer: the built base optimizer; it must hold adapter parameters of `model`.
        model: the model with adapters, before or after DDP or FSDP wrap it.
        sigma: σ, noise per row relative to the row's norm. 0 switches the method off. May be set between steps. The
            paper's 0.03 does next to nothing to an encoder of 22M parameters, where 0.2 acts and 0.6 destroys.
        beta: β, weight of the squared gradient norm. At 0.01 the gradient term has 1e-7 of the variance in a small
            encoder, so the noise is Flat-LoRA's in all but name; see ``metrics()["gradient_share"]``.
        noise: ``"gaussian"``, independent in every element; or ``"low_rank"``, ``diag(d)·U·V/√noise_rank``: the same
            covariance at the cost of an adapter of that rank, but heavier tails and a larger spread of the loss between
            draws, on a pure quadratic 2.6 times as large at the default rank of 8. On that encoder its accuracy was 1.8
            ± 1.1 points below Gaussian noise's (8 paired seeds, p = 0.13). On GPUs take it until both are timed there:
            Gaussian noise is as large as the weights, by count some 78 GB of memory traffic a pass at 7B.
        noise_rank: rank of ``"low_rank"`` noise.
        update_every: each layer's standard deviations are computed in every so many steps, the layers taking turns, and
            go on meanwhile for new draws; 1 is the paper. Held over eight steps, a row's was off by 0.02 % or less in
            the mean and 1.3 % at most on that encoder (lr 5e-4, β = 0). A new σ or β is felt at once, the gradient and
            what else is written to the weights at a layer's turn.
        adapter: name or names of the adapters; None for all whose parameters `optimizer` holds and that require a
            gradient now.
        seed: of the private noise generator; by default torch's initial seed, rank 0's when distributed.
        perturb_no_grad: perturb passes in train mode that record no gradients too, such as ``torch.no_grad()``'s.

    Raises:
        ValueError: a bad number or name, no adapted layer, an optimizer without adapter parameters, a model that
            another `GGPOOptimizer` perturbs and has not stepped with. Nothing has been attached then.
        TypeError: `optimizer` or `model` is of the wrong type.
        RuntimeError: from `step()`, once an optimizer that was built later has taken the model over.

    Example:
        >>> optimizer = GGPOOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), model)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
    """

    _strength = "sigma"

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        sigma: float = 0.03,
        beta: float = 0.01,
        noise: Literal["gaussian", "low_rank"] = "gaussian",
        noise_rank: int = 8,
        update_every: int = 8,
        adapter: str | Iterable[str] | None = None,
        seed: int | None = None,
        perturb_no_grad: bool = False,
    ):
        super().__init__(optimizer)
        sigma, beta = checks.number("sigma", sigma), checks.number("beta", beta)
        checks.option("noise", noise, ("gaussian", "low_rank"))
        noise_rank = checks.integer("noise_rank", noise_rank, 1)
        update_every = checks.integer("update_every", update_every, 1)
        seed = shared_seed() if seed is None else checks.integer("seed", seed, -(2**63))
        self._model, self._adapter = model, adapter
        layers = trained_by(model, adapter, optimizer)
        self._source = RowNoise(layers, sigma, beta, noise, noise_rank, seed, update_every)
        self._source.no_grad = perturb_no_grad
        self.reattach()

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """As the base optimizer's. All evaluations of a `closure` see one ε, wherever they move the parameters."""
        with nullcontext() if closure is None else self._source.keeping():
            return super().step(closure, **kwargs)

    @property
    def _reads_gradients(self) -> bool:
        return self._attached and self._source.sigma > 0 and self._source.beta > 0

    def check_first_step(self) -> None:
        if self._reads_gradients:  # by their size, which is another where a scale is still on them
            self.refuse_replaced("GGPOOptimizer(beta=0), which needs no gradients")

    def before_step(self) -> None:
        super().before_step()
        if self._reads_gradients and not self._source.read_gradients():
            self.miss_gradients("the noise goes on without a gradient term")

    def row_std(self) -> dict[str, Tensor]:
        """The standard deviation of each row's noise at present, per element: ``{layer name: (m,) tensor}``."""
        return self._source.row_std()

    def metrics(self) -> dict[str, Tensor]:
        """Over all layers together, once a pass was perturbed; the last two are ratios without a unit.

        ``loss_rise``: how far ε raises the loss, in its units: half the running mean over about fifty steps of
        ``⟨G(W'+ε), ε⟩``, whose mean is ``εᵀHε``, as noise has no first order. Of this rank's share of the data.
        ``loss_rise_se``: its standard error. Under Gaussian noise a step measures one layer, each in turn, for all.
        ``noise_to_weight``: expected ‖ε‖_F over ‖W'‖_F; σ, where gradients are negligible.
        ``gradient_share``: the share of ε's variance that the gradient term has, from 0 to 1.
        """
        if not self._attached or (squares := self._source.squares()) is None:
            return super().metrics()
        noise, weight, share = squares
        rise, error = self._source.rise.mean()
        ratios = {"noise_to_weight": (noise / weight).sqrt(), "gradient_share": share}
        return self._with_inner({"loss_rise": rise, "loss_rise_se": error, **ratios})

    @property
    def sigma(self) -> float:
        """σ; a change is felt at the next forward."""
        return self._source.sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._source.sigma = checks.number("sigma", value)

    @property
    def beta(self) -> float:
        """β; a change is felt at the next forward."""
        return self._source.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._source.beta = checks.number("beta", value)

    def method_state(self) -> dict[str, Any]:
        noise = self._source
        layers: dict[str, Any] = self.layer_identities()
        for name, layer in layers.items():
            for field, rows in (("grad_sq", noise.grad_sq.get(name)), ("std", noise.std_in_use(name))):
                layer[field] = None if rows is None else rows.clone()  # of a tensor of many layers
        numbers = {"seed": noise.seed, "step": noise.step, "sigma": noise.sigma, "beta": noise.beta}
        return {**numbers, "form": [noise.kind, noise.rank], "layers": layers, "rise": noise.rise.state()}

    def check_method_state(self, state: dict[str, Any]) -> None:
        checks.state_fields("GGPO", state, "seed", "step", "sigma", "beta", "form", "layers")
        for name in ("sigma", "beta"):
            checks.number(f"the state_dict's {name}", state[name])
        checks.integer("the state_dict's step", state["step"], 0)
        check_rise(state)
        checks.integer("the state_dict's seed", state["seed"], -(2**63))
        form = state["form"]
        if not (isinstance(form, list | tuple) and len(form) in (2, 3)):
            raise ValueError(f"the state_dict's form must be [noise, noise_rank], got {form!r}")
        if len(form) == 3 and form[2]:  # of version 0.1.0
            raise ValueError(
                "the state_dict was written with relative_beta=True, an option that is gone; go on with flatlora 0.1.0 "
                "or load the adapter alone and start with a new optimizer"
            )
        self.check_layer_states("GGPO", state["layers"], "grad_sq")
        for name, layer in state["layers"].items():
            for field in ("grad_sq", "std"):  # the second is not in those of version 0.1.0
                found, m = layer.get(field), layer["shape"][0]
                if found is not None and not (isinstance(found, Tensor) and tuple(found.shape) == (m,)):
                    raise ValueError(f"the state_dict's {field} of layer {name!r} must be None or a tensor ({m},)")
            if layer.get("std") is not None and not (layer["std"].isfinite() & (layer["std"] >= 0)).all():
                raise ValueError(f"the state_dict's std of layer {name!r} must be finite and >= 0")

    def load_method_state(self, state: dict[str, Any] | None) -> None:
        noise = self._source
        noise.grad_sq = {}
        noise.forget()
        noise.rise.load(state)
        if state is None:
            logger.warning("the checkpoint has no GGPO part: the noise starts afresh, without a gradient term")
            noise.step = 0
            return
        form, theirs = [noise.kind, noise.rank], list(state["form"][:2])
        if theirs != form:  # which stays this optimizer's
            logger.warning("resumed with [noise, noise_rank] = %s, not %s", form, theirs)
        noise.seed, noise.step = state["seed"], state["step"]
        self.take_over(state, "sigma", "beta")
        for name, layer in state["layers"].items():
            if layer["grad_sq"] is not None:
                noise.grad_sq[name] = layer["grad_sq"].to(noise.layers[name].base.device, copy=True)
            if layer.get("std") is not None:
                noise.go_on_with(name, layer["std"])
