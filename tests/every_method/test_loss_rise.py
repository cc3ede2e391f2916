"""How far ε raises the loss, as the products tell it: against autograd on dense ε."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods import METHODS, PERTURBING, Method, adapted, batch, every_method, gralora, lorasam, sgd, trained
from torch import Tensor, nn

import flatlora
from flatlora.kernels.draw import draw_gaussian, draw_low_rank
from flatlora.layers.adapter import Adapter

MEASURED = [
    *PERTURBING[:4],
    Method("GraLoRA under LoRASAM", gralora, lorasam),
    Method("DoRA under LoRASAM", METHODS[4].adapt, lorasam),
    Method("DoRA under GGPO", METHODS[4].adapt, METHODS[0].build),
]


def dense(optimizer: Any) -> dict[str, Tensor]:
    """ε (m, n) of each layer at present."""
    if isinstance(optimizer, flatlora.BiLoRAOptimizer):
        return {name: s * (B @ A).detach() for name, (A, B, s) in optimizer._auxiliaries().items()}
    found = {}
    for name, one in optimizer.current_perturbation().items():
        m, n = optimizer._source.layers[name].shape
        if one is None:
            found[name] = torch.zeros(m, n, dtype=torch.float64)
        elif isinstance(one, Adapter):
            found[name] = one.scaling * (one.B @ one.A if one.A.dim() == 2 else whole(one.B @ one.A))
        elif one.kind == "gaussian":
            found[name] = draw_gaussian(one, n, None, torch.float64)
        else:
            U, V = draw_low_rank(one, n, torch.float64)
            found[name] = U @ V
    return found


def whole(blocks: Tensor) -> Tensor:
    """A grid of blocks (g, g, m/g, n/g) as the matrix (m, n)."""
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def derivative(model: nn.Module, optimizer: Any, batches: list[Any], only: str | None = None) -> float:
    """``d/dλ Σ L(W' + λ·ε)`` at λ = 1 by autograd, of the layer `only` if one is named, ε dense beside each layer."""
    noise, layers = dense(optimizer), optimizer._source.layers
    dials = {name: torch.ones((), dtype=torch.float64, requires_grad=True) for name in noise}
    hooks = [
        layers[name].module.register_forward_hook(
            lambda _, args, out, name=name: out + dials[name] * (args[0] @ noise[name].t())
        )
        for name in noise
    ]
    with optimizer.unperturbed():
        loss = sum(model(**one).loss for one in batches)
        found = torch.autograd.grad(loss, list(dials.values()))
    for hook in hooks:
        hook.remove()
    return float(sum(g for name, g in zip(dials, found, strict=True) if only in (None, name)))


def started(method: Method, **kwargs: Any) -> tuple[nn.Module, Any]:
    model = adapted(method, **kwargs).double()
    return model, method.start(model, sgd)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@every_method(among=MEASURED)
def test_it_is_the_derivative_of_the_loss_by_the_perturbations_size(method: Method, compiled: bool) -> None:
    model, optimizer = started(method)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    layers = list(optimizer._source.layers)
    gaussian = "GGPO" in method.name and "low_rank" not in method.name
    for i in range(5 if gaussian else 3):
        micro = [batch(2 * i), batch(2 * i + 1)]
        only = layers[i] if gaussian else None
        expected = derivative(model, optimizer, micro, only)
        for one in micro:
            run(**one).loss.backward()
        nn.utils.clip_grad_norm_(trained(model), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        expected *= 0.5 * len(layers) if gaussian else 0.5 if "GGPO" in method.name else 1.0
        if gaussian and compiled and i < 3:
            continue  # queries, keys and values of the first block, whose input needs no gradient: backward stops before
        assert optimizer._source.rise.value.item() == pytest.approx(expected, rel=1e-5, abs=1e-12), i
        if i:  # LoRASAM's first step has no ε, Bi-LoRA's auxiliary is zero in it
            assert abs(expected) > 1e-7
            assert "loss_rise" in optimizer.metrics()
