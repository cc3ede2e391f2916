"""The largest eigenvalue of the loss's Hessian in the adapters' parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import checks
from ..layers.view import lora_layers
from .measuring import Losses, LossFn, measuring


@dataclass(frozen=True)
class TopEigenvalue:
    """What the power iteration arrived at.

    Attributes:
        value: λ, the Rayleigh quotient ``vᵀHv`` of its last unit vector.
        residual: ``‖Hv − λv‖``; an eigenvalue of H lies this close to λ. Near convergence λ's error is of the order of
            its square.
        iterations: number of Hessian-vector products.
        converged: whether the residual came below ``tolerance · |λ|``.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def hessian_top_eigenvalue(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    tolerance: float = 0.02,
    iterations: int = 50,
    seed: int = 0,
    adapter: str | Iterable[str] | None = None,
    progress: bool = False,
) -> TopEigenvalue:
    """The largest eigenvalue of the Hessian of the mean loss by the adapters' parameters: the smaller, the flatter.

    Power iteration, with one forward and two backward passes over `batches` for each product ``Hv``. It iterates on
    ``H + s·I``, with s the largest ``‖Hv‖`` so far, so as not to find a negative eigenvalue that is larger in size: the
    Hessian of a LoRA has negative ones while B is zero.

    Eigenvalues depend on how A and B are scaled against each other: compare models of one rank, scaling and
    initialisation, or use `worst_case_rise`, which is of the full weights. PEFT's DoRA takes the norms as constant in
    its gradient, and so does this Hessian.

    The model is measured in eval mode and left as it was found, `.grad` included. `scaled_dot_product_attention` takes
    torch's plain path meanwhile, as its fused ones can't be differentiated twice.

    Args:
        model, loss_fn, batches, progress: as in `noise_rise`.
        tolerance: of the residual, relative to the eigenvalue.
        iterations: the most Hessian-vector products.
        seed: of the first vector, from a private generator.
        adapter: name or names of the adapters whose parameters count; None for all that require gradients.

    Raises:
        ValueError: no batches, no adapted layer, no parameter of one that requires a gradient.
        RuntimeError: torch's, from an operation that can't be differentiated twice.
    """
    tolerance, iterations = checks.number("tolerance", tolerance), checks.integer("iterations", iterations, 1)
    params = _trained(model, adapter)
    generator = torch.Generator().manual_seed(checks.integer("seed", seed, -(2**63)))
    like = params[0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    v = torch.randn(sum(p.numel() for p in params), dtype=dtype, generator=generator, device="cpu").to(like.device)
    v /= v.norm()
    shift = torch.zeros((), dtype=dtype, device=like.device)
    with measuring(model, loss_fn, batches, "hessian_top_eigenvalue", iterations, progress) as losses:
        for made in range(1, iterations + 1):
            product = _hessian_times(v, params, losses)
            value = v @ product
            residual = (product - value * v).norm()
            found = TopEigenvalue(float(value), float(residual), made, bool(residual <= tolerance * value.abs()))
            if found.converged:
                break
            shift = torch.maximum(shift, product.norm())
            v = product + shift * v
            v /= v.norm()
    return found


def _trained(model: nn.Module, adapter: str | Iterable[str] | None) -> list[nn.Parameter]:
    adapters = [a for layer in lora_layers(model, adapter) for a in layer.all_adapters()]
    held = [p for a in adapters for p in (a.A_param, a.B_param, a.magnitude)]
    params = list(dict.fromkeys(p for p in held if isinstance(p, nn.Parameter) and p.requires_grad))
    if not params:
        raise ValueError(f"none of the {len(held)} parameters of the adapters requires a gradient; {checks.UNFREEZE}")
    return params


def _hessian_times(v: Tensor, params: list[nn.Parameter], losses: Losses) -> Tensor:
    """``Hv`` of the mean loss, as one vector over all parameters."""
    parts = [part.view_as(p).to(p) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
    total = torch.zeros_like(v)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for loss in losses.differentiable():
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            # A gradient that depends on no parameter has no graph and adds nothing.
            pairs = [(g, part) for g, part in zip(grads, parts, strict=True) if g is not None and g.requires_grad]
            if pairs:
                outputs, vectors = zip(*pairs, strict=True)
                products = torch.autograd.grad(outputs, params, vectors, allow_unused=True, materialize_grads=True)
                total += torch.cat([product.reshape(-1).to(total) for product in products])
    return total / len(losses)
