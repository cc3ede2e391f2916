"""LoRA-GGPO: train under weight noise whose rows follow the size of the weights and of their gradients."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .layers import LoRALayer, keep_training_layout, lora_layers, release_layout, shared_seed, whole, wide
from .perturbation import Draw, Perturbation, stacked
from .wrapper import OptimizerWrapper

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
        self._noise = RowNoise(layers, sigma, beta, noise, noise_rank, seed)
        self._held = keep_training_layout(model)
        self._perturbations = [Perturbation(layer, self._noise) for layer in layers]
        for perturbation in self._perturbations:
            perturbation.attach()

    # --- the method: a step looks at the gradients, moves the parameters, and goes on to the next ε ---------------

    def before_step(self) -> None:
        if self._noise.sigma > 0 and self._noise.beta > 0:
            self._noise.observe_gradients()

    def after_step(self) -> None:
        self._noise.step += 1

    def row_std(self) -> dict[str, Tensor]:
        """The standard deviation of each row's noise at present, per element: ``{layer name: (m,) tensor}``."""
        return {name: self._noise.std(rows).clone() for name, rows in self._noise.rows.items()}

    @property
    def sigma(self) -> float:
        """σ, read at the first forward of each step."""
        return self._noise.sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._noise.sigma = _non_negative("sigma", value)

    @property
    def beta(self) -> float:
        """β, read at the first forward of each step."""
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

    def remove(self) -> None:
        """Takes everything off the model. Idempotent; the optimizer goes on as its base optimizer."""
        for perturbation in self._perturbations:
            perturbation.remove()
        release_layout(self._held)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        noise = self._noise
        layers = {
            name: {"shape": list(rows.layer.shape), "ranks": rows.ranks(), "grad_sq": rows.grad_sq}
            for name, rows in noise.rows.items()
        }
        return {"seed": noise.seed, "step": noise.step, "sigma": noise.sigma, "beta": noise.beta, "layers": layers}

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
        noise = self._noise
        if state is None:
            logger.warning("the checkpoint has no GGPO part: the noise starts afresh, without a gradient term")
            noise.step = 0
        else:
            noise.seed, noise.step = state["seed"], state["step"]
            noise.sigma, noise.beta = state["sigma"], state["beta"]
        for name, rows in noise.rows.items():
            grad_sq = None if state is None else state["layers"][name]["grad_sq"]
            rows.grad_sq = None if grad_sq is None else grad_sq.to(rows.layer.base.device, copy=True)
            rows.cached = None


@dataclass
class _Rows:
    """What is remembered of one layer: squared row norms of its weights and of its last gradient."""

    layer: LoRALayer
    grad_sq: Tensor | None = None
    base_sq: Tensor | None = None
    cached: tuple[Any, Tensor] | None = None  # (what it was computed from, standard deviations)

    def ranks(self) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for adapter in self.layer.all_adapters():  # a hybrid GraLoRA layer has two of a name
            ranks[adapter.name] = ranks.get(adapter.name, 0) + adapter.rank
        return ranks

    def weight_sq(self) -> tuple[Tensor, dict[str, Tensor]]:
        """``‖W'_i‖²`` (m,) over all active adapters, and DoRA's row factors by adapter name.

        Expands the square of ``diag(a)·W0 + Σ_k s_k·diag(c_k)·B_k·A_k``, so that W0 enters through ``‖W0_i‖²``, which
        is computed once, and through ``W0·Aᵀ`` alone. Everything is done block by block on a grid of g×g blocks, on
        which GraLoRA's adapters are low-rank adapters like any other; without GraLoRA g is 1.
        """
        layer = self.layer
        base_sq = self.base_sq
        if base_sq is None or layer.merged or layer.base.trainable:
            base_sq = layer.base.row_sq()
            if not (layer.merged or layer.base.trainable):
                self.base_sq = base_sq
        adapters = layer.adapters()
        if not adapters:
            return base_sq, {}
        dtype = wide(base_sq.device)
        grid = math.lcm(*(adapter.k for adapter in adapters))
        a_parts, b_parts = zip(*(adapter.blocks(grid) for adapter in adapters), strict=True)
        a = torch.cat(a_parts, 2)
        crossed = layer.base.apply_blocks(a).to(dtype)  # W0·Aᵀ
        a = a.to(dtype)
        parts, factors, ranks = [], {}, [part.shape[2] for part in a_parts]
        base_factor = torch.ones_like(base_sq)
        for adapter, b_k, a_k, crossed_k in zip(
            adapters, b_parts, a.split(ranks, 2), crossed.split(ranks, 3), strict=True
        ):
            b_k = b_k.to(dtype) * adapter.scaling
            if adapter.magnitude is not None:
                norm_sq = base_sq + _row_dot(b_k, 2 * crossed_k + b_k @ (a_k @ a_k.mT))
                factor = whole(adapter.magnitude).to(dtype) * norm_sq.rsqrt()
                factors[adapter.name] = factor
                base_factor += factor - 1
                b_k = b_k * factor.view(grid, 1, -1, 1)
            parts.append(b_k)
        b = torch.cat(parts, 3)
        cross = 2 * base_factor.view(grid, 1, -1, 1) * crossed
        return base_factor.square() * base_sq + _row_dot(b, cross + b @ (a @ a.mT)), factors

    def projected_grad_sq(self) -> Tensor | None:
        """``‖(P_B·G + G·P_A − P_B·G·P_A)_i‖²`` (m,), or None without gradients.

        As G·P_A lies in the row space of A and the rest is orthogonal to it, the squares of the two parts add up:
        with ``C = BᵀG = g_A/s`` and ``D = GAᵀ = g_B/s`` they are the row norms of ``B(BᵀB)⁺·C(I − P_A)`` and of
        ``D(AAᵀ)⁺·A``.

        GraLoRA's tangent space is the direct sum of its blocks', so each block is projected on its own and the squares
        add up along a block row. The plain adapter of a hybrid layer spans directions that the blocks partly span
        too; it is left out, and what stands for G is its projection on the blocks' tangent space alone.
        """
        layer = self.layer
        adapters = [
            (adapter, grads)
            for adapter in layer.adapters()
            if adapter.name in layer.names and adapter.scaling and (grads := adapter.grads()) is not None
        ]
        if not adapters:
            return None
        grid = max(adapter.k for adapter, _ in adapters)
        adapters = [(adapter, grads) for adapter, grads in adapters if adapter.k == grid]
        dtype = wide(layer.base.device)
        eps = torch.finfo(adapters[0][1][0].dtype).eps
        factors = self.weight_sq()[1] if any(adapter.magnitude is not None for adapter, _ in adapters) else {}
        parts: list[tuple[Tensor, ...]] = []
        for adapter, grads in adapters:
            a_k, b_k = (factor.to(dtype) for factor in adapter.blocks(grid))
            grad_a, grad_b = (grad.to(dtype) / adapter.scaling for grad in grads)
            c_k, d_k = grad_a.view(a_k.shape), grad_b.view(b_k.shape)
            if adapter.name in factors:
                factor = factors[adapter.name].view(grid, 1, -1, 1)
                b_k, d_k = b_k * factor, d_k / factor
            parts.append((a_k, b_k, c_k, d_k))
        a, b, c, d = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (2, 3, 2, 3), strict=True))
        gram_a, gram_b = _inverse(a @ a.mT, eps), _inverse(b.mT @ b, eps)
        rest = c - (c @ a.mT) @ gram_a @ a  # C(I − P_A)
        left = b @ gram_b
        return _row_dot(left, left @ (rest @ rest.mT)) + _row_dot(d, d @ gram_a)


class RowNoise:
    """The noise of all layers: its σ, β and step, and the rows it is scaled by.

    `everywhere` perturbs layers in eval mode as well, for measuring.
    """

    def __init__(
        self,
        layers: list[LoRALayer],
        sigma: float,
        beta: float,
        kind: Literal["gaussian", "low_rank"],
        rank: int,
        seed: int,
        everywhere: bool = False,
    ):
        self.rows = {layer.name: _Rows(layer) for layer in layers}
        self.sigma, self.beta, self.kind, self.rank, self.seed = sigma, beta, kind, rank, seed
        self.everywhere = everywhere
        self.step = 0
        self.on = True
        self._warned = False

    def draw(self, layer: LoRALayer) -> Draw | None:
        if not (self.on and self.sigma > 0 and layer.active and (self.everywhere or layer.module.training)):
            return None
        return Draw(self.kind, self.std(self.rows[layer.name]), self._layer_seed(layer.name), self.rank)

    def _layer_seed(self, name: str) -> int:
        # A function of (seed, step, layer) rather than a running stream: every micro-batch, every recomputation, every
        # rank and a resumed run get the same ε, and nothing but these numbers has to be kept.
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def std(self, rows: _Rows) -> Tensor:
        """Standard deviations (m,) of a layer's rows, computed when first asked for in a step."""
        adapters = rows.layer.adapters()
        versions = [(a.name, a.scaling, a.A._version, a.B._version) for a in adapters]
        key = (self.step, self.sigma, self.beta, rows.layer.merged, versions)
        if rows.cached is None or rows.cached[0] != key:
            # Out of inference mode, or the first forward of a step under it would leave tensors unfit for autograd.
            with torch.inference_mode(False), torch.no_grad():
                row_sq = rows.weight_sq()[0]
                if rows.grad_sq is not None:
                    row_sq = row_sq + self.beta * rows.grad_sq
                variance = row_sq.mul(self.sigma**2 / rows.layer.shape[1])
                rows.cached = key, variance.nan_to_num(0.0, posinf=0.0).clamp_(min=0.0).sqrt_()
        return rows.cached[1]

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Replaces the gradient norms by those of the gradients at hand, unless any of them is not finite."""
        found = {name: new for name, rows in self.rows.items() if (new := rows.projected_grad_sq()) is not None}
        if not found:
            if not self._warned:
                logger.warning("step() found no adapter gradients: the noise goes on without a gradient term")
            self._warned = True
            return
        # Decided on the device: asking the host whether all is finite would stall it at every step.
        sums = [new.sum() for new in found.values()]
        finite = torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()
        for name, new in found.items():
            old = self.rows[name].grad_sq
            keep = torch.zeros_like(new) if old is None else old
            self.rows[name].grad_sq = torch.where(finite.to(new.device), new, keep)
            self.rows[name].cached = None


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows of a and b, on a grid of blocks (k, k, m/k, ·), summed along each row of the whole: (m,)."""
    return (a * b).sum((1, 3)).flatten()


def _inverse(gram: Tensor, eps: float) -> Tensor:
    """(X·Xᵀ)⁺ of Gram matrices (..., r, r) that may be singular, as B's is before the first step.

    A pseudo-inverse would need eigenvalues, which stall a GPU. A ridge of `eps` times the trace, `eps` the precision of
    the gradients, damps only directions in which the gradients hold nothing but rounding.
    """
    ridge = gram.diagonal(dim1=-2, dim2=-1).sum(-1) * eps + torch.finfo(gram.dtype).tiny
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    factor, _ = torch.linalg.cholesky_ex(gram + ridge[..., None, None] * eye)
    return torch.cholesky_solve(eye, factor)


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
