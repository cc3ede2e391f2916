"""LoRASAM whose ρ is a share of what the adapters have learnt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import sgd
from methods import Method, adapted, batch, every_method, gralora, lora, lorasam
from models import trained
from torch import nn

import flatlora

KINDS = [Method("LoRA", lora, lorasam), Method("GraLoRA", gralora, lorasam)]


def update_norm(model: nn.Module) -> float:
    """``‖s·B·A‖_F`` over all layers, from what each adds to unit vectors."""
    total = 0.0
    for layer in flatlora.lora_layers(model):
        eye = torch.eye(layer.shape[1], dtype=torch.float64)
        layer.module.eval()
        with torch.no_grad():
            whole = layer.module(eye)
            base = nn.functional.linear(eye, layer.base.float_weight())
        layer.module.train()
        total += float((whole - base).square().sum())
    return total**0.5


def relative(model: nn.Module, **kwargs: Any) -> flatlora.LoRASAMOptimizer:
    return flatlora.LoRASAMOptimizer(sgd(trained(model)), model, relative=True, **kwargs)


def step(model: nn.Module, optimizer: Any, i: int) -> None:
    model(**batch(i)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@every_method(among=KINDS)
def test_epsilon_is_a_share_of_the_update_that_the_last_step_began_with(method: Method) -> None:
    model = adapted(method).double()
    optimizer = relative(model, rho=0.1)
    for i in range(3):
        expected = 0.1 * update_norm(model)
        step(model, optimizer, i)
        assert optimizer.perturbation_norm() == pytest.approx(expected, rel=1e-9) and expected > 0


def test_its_direction_is_that_of_the_fixed_radius_and_nothing_is_learnt_at_first() -> None:
    found = []
    for options in ({"rho": 0.05}, {"relative": True}):
        model = adapted(KINDS[0]).double()
        optimizer = flatlora.LoRASAMOptimizer(sgd(trained(model)), model, **options)
        step(model, optimizer, 0)
        found.append({name: one.B @ one.A for name, one in optimizer.current_perturbation().items()})
    ratios = [found[1][name].norm() / found[0][name].norm() for name in found[0]]
    for name in found[0]:
        torch.testing.assert_close(found[1][name], ratios[0] * found[0][name])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    step(model, optimizer, 1)
    assert optimizer.perturbation_norm() == 0


def test_a_checkpoint_goes_on_to_the_bit_and_one_of_the_other_meaning_is_refused() -> None:
    model = adapted(KINDS[0])
    optimizer = relative(model)
    assert optimizer.rho == 0.02
    for i in range(2):
        step(model, optimizer, i)
    again = adapted(KINDS[0])
    again.load_state_dict(model.state_dict())
    other = relative(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(2, 4):
        step(model, optimizer, i)
        step(again, other, i)
    assert all(torch.equal(p, q) for p, q in zip(trained(model), trained(again), strict=True))
    fixed = flatlora.LoRASAMOptimizer(sgd(trained(again)), again)
    with pytest.raises(ValueError, match="relative=True"):
        fixed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="relative=False"):
        optimizer.load_state_dict(fixed.state_dict())
