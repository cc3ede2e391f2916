"""Every method against its plain reference, on two layers in float64."""

from __future__ import annotations

from types import SimpleNamespace

import models
import pytest
import torch
import torch.nn.functional as F
from helpers import applied_weight
from models import MLP, peft, trainable
from torch import nn

import flatlora
from flatlora import reference

N, HIDDEN, M = 16, 24, 12
TARGETS = ["up", "down"]


class Task(MLP):
    """An MLP that returns its own loss, as a function of its weights too."""

    def forward(self, x, labels):
        return SimpleNamespace(loss=F.mse_loss(super().forward(x), labels))


def loss_at(weights, x, labels):
    up, down = weights
    return F.mse_loss(F.silu(x @ up.t()) @ down.t(), labels)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(32, size, dtype=torch.float64, generator=generator) for size in (N, M))
    return {"x": x.to(models.DEVICE), "labels": y.to(models.DEVICE)}


def model_of(**config):
    return peft(Task(N, HIDDEN, M), TARGETS, **config).to(models.DEVICE)


def modules(model):
    return [model.get_submodule(f"base_model.model.{name}") for name in TARGETS]


def factors(module):
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def layers(model):
    """(W0, A, B, s) of each layer, copied."""
    found = []
    for module in modules(model):
        W0, (A, B), s = module.base_layer.weight, factors(module), module.scaling["default"]
        found.append((*(p.detach().clone() for p in (W0, A, B)), s))
    return found


def loss(weights):
    return loss_at(weights, **batch())


def assert_close(found, expected):
    torch.testing.assert_close([p.detach() for p in found], list(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
def test_ggpo_takes_the_step_of_its_reference_and_goes_on_with_its_row_deviations(noise):
    model = model_of()
    optimizer = flatlora.GGPOOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.2, beta=3.0, noise=noise, update_every=1, seed=5
    )
    before = layers(model)
    assert_close(optimizer.row_std().values(), [reference.ggpo_std(reference.lora(*layer), 0.2) for layer in before])

    weights = [noisy_weight(module) for module in modules(model)]
    eps = [W - reference.lora(*layer) for W, layer in zip(weights, before, strict=True)]
    assert all(e.abs().max() > 0.01 for e in eps)
    model(**batch()).loss.backward()
    optimizer.step()
    new, G = reference.ggpo_step(loss, before, eps, lr=0.1)
    for module, expected in zip(modules(model), new, strict=True):
        assert_close(factors(module), expected)

    tangent = [reference.projected(g, B, A) for g, (_, A, B, _) in zip(G, before, strict=True)]
    expected = [
        reference.ggpo_std(reference.lora(*layer), 0.2, 3.0, T) for layer, T in zip(layers(model), tangent, strict=True)
    ]
    assert_close(optimizer.row_std().values(), expected)


def test_lorasam_takes_the_steps_of_its_reference():
    model = model_of()
    optimizer = flatlora.LoRASAMOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, rho=0.3)
    eps = [torch.zeros_like(W0) for W0, *_ in layers(model)]
    for _ in range(3):
        before = layers(model)
        for module, layer, e in zip(modules(model), before, eps, strict=True):
            torch.testing.assert_close(noisy_weight(module), reference.lora(*layer) + e, rtol=1e-9, atol=1e-12)
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        new, G = reference.ggpo_step(loss, before, eps, lr=0.1)
        for module, expected in zip(modules(model), new, strict=True):
            assert_close(factors(module), expected)
        eps = reference.lorasam_perturbation(G, before, 0.3)


def noisy_weight(module):
    """The matrix that a layer applies in a pass that trains it."""
    return module(torch.eye(module.in_features, dtype=torch.float64, device=models.DEVICE)).detach().t()


@pytest.mark.parametrize("rho", [0.05, 100.0], ids=["clipped", "not clipped"])
def test_bilora_takes_the_steps_of_its_reference(rho):
    model = model_of()
    optimizer = flatlora.BiLoRAOptimizer.for_model(model, torch.optim.SGD, r=3, rho=rho, seed=1, lr=0.1)
    ascending = optimizer.param_groups[1]["params"]
    for _ in range(3):
        before = layers(model)
        # The default alpha is 2·r, so that the scaling is 2.
        pairs = [(p.detach().clone(), q.detach().clone(), 2.0) for p, q in zip(*[iter(ascending)] * 2, strict=True)]
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        primary, auxiliary = reference.bilora_step(loss, before, pairs, 0.1, rho)
        for module, expected in zip(modules(model), primary, strict=True):
            assert_close(factors(module), expected)
        assert_close(ascending, [p for pair in auxiliary for p in pair])


def test_bidora_takes_the_hypergradient_of_its_reference():
    model = model_of(use_dora=True)
    V, mu = flatlora.direction_parameters(model), flatlora.magnitude_parameters(model)
    levels = torch.optim.SGD(V, lr=0.1), torch.optim.SGD(mu, lr=0.1)
    train, val = batch(1), batch(2)
    optimizer = flatlora.BilevelOptimizer(*levels, model, [train], [val], xi=0.5, orthogonality=0.0, epsilon=1e-4)
    fixed = [(W0, s) for W0, _, _, s in layers(model)]

    def of(data):
        def value(V, mu, norm_moves=False):
            parts = zip(fixed, V[::2], V[1::2], mu, strict=True)
            return loss_at([reference.dora(W0, A, B, s, m, norm_moves) for (W0, s), A, B, m in parts], **data)

        return value

    found = optimizer.hypergradient(train, val)
    expected = reference.bidora_hypergradient(of(train), of(val), V, mu, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_bidora_adds_the_orthogonality_of_its_reference():
    gamma, results = 0.3, []
    for weight in (0.0, gamma):
        torch.manual_seed(0)
        model = model_of(use_dora=True)
        V, mu = flatlora.direction_parameters(model), flatlora.magnitude_parameters(model)
        levels = torch.optim.SGD(V, lr=1.0), torch.optim.SGD(mu, lr=0.0)
        optimizer = flatlora.BilevelOptimizer(*levels, model, [batch(1)], [batch(2)], orthogonality=weight)
        before = layers(model)
        optimizer.step()
        results.append([p.detach() for p in V])
    A_and_B = [[A.requires_grad_(), B.requires_grad_()] for _, A, B, _ in before]
    R = reference.orthogonality(
        [reference.lora(W0, *pair, s) for (W0, _, _, s), pair in zip(before, A_and_B, strict=True)]
    )
    expected = torch.autograd.grad(R, [p for pair in A_and_B for p in pair])
    torch.testing.assert_close(
        [without - with_r for without, with_r in zip(*results, strict=True)], [gamma * g for g in expected]
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gralora_applies_the_update_of_its_reference(k):
    model = nn.Sequential(nn.Linear(N, HIDDEN, bias=False)).double().to(models.DEVICE)
    W0 = model[0].weight.detach().clone()
    flatlora.apply_gralora(model, ["0"], r=8, k=k, alpha=12)
    nn.init.normal_(model[0].gralora_B)
    expected = reference.gralora_delta(model[0].gralora_A.detach(), model[0].gralora_B.detach(), 12 / 8)
    assert_close([applied_weight(model[0], N) - W0, model[0].delta_weight()], [expected, expected])
