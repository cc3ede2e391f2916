"""GGPO and Bi-LoRA on top of GraLoRA layers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from gralora_models import gradients, layer, peft_layer
from helpers import noise_of
from torch import nn

from flatlora import BiLoRAOptimizer, GGPOOptimizer, attach_auxiliary, detach_auxiliary, lora_layers
from flatlora.kernels.draw import draw_gaussian
from flatlora.layers.stack import BaseNorms, stacks, weight_sq
from flatlora.layers.tangent import project, projection_row_sq


def blocks_of(ours, weight):
    """The k×k blocks of an (m, n) tensor: [i, j] (m/k, n/k)."""
    m, n = weight.shape
    return weight.view(ours.k, m // ours.k, ours.k, n // ours.k).transpose(1, 2)


def projected_rows(ours, gradient):
    """Row norms of the projection of `gradient` (m, n) on the blocks' tangent spaces, with pseudo-inverses."""
    k, q = ours.k, ours.r // ours.k
    total = torch.zeros(k, gradient.shape[0] // k, dtype=gradient.dtype)
    for i, j in itertools.product(range(k), range(k)):
        G = blocks_of(ours, gradient)[i, j]
        A = ours.gralora_A[j, :, i * q : (i + 1) * q].t().detach()
        B = ours.gralora_B[i, j * q : (j + 1) * q].t().detach()
        P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
        total[i] += (P_B @ G + G @ P_A - P_B @ G @ P_A).square().sum(1)
    return total.flatten()


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["float64", "conv1d", "nf4", "int8"])
@pytest.mark.parametrize(("k", "hybrid"), [(1, 0), (2, 0), (4, 0), (4, 3)])
def test_row_norms_are_exact(kind, k, hybrid, peft):
    m, n = (24, 16) if kind in ("float64", "conv1d") else (128, 64)
    ours = layer(kind, m=m, n=n, r=8, k=k, hybrid_r=hybrid)
    if kind in ("float64", "conv1d"):
        ours.double()
    module = peft_layer(ours) if peft else ours
    (view,) = lora_layers(nn.Sequential(module))
    assert view.shape == (m, n) and view.base.kind == {"nf4": "4bit", "int8": "8bit"}.get(kind, "float")
    base = view.base.float_weight() if view.base.kind == "float" else view.base.dense(torch.float32)
    (found,), _ = weight_sq(*stacks([view]), BaseNorms())
    tolerance = 1e-12 if kind == "float64" else 1e-4
    expected = (base + ours.delta_weight()).double().square().sum(1)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_projected_gradient_is_exact_block_by_block(k, peft):
    ours = layer("float64", m=32, n=32, r=8, k=k)
    module = peft_layer(ours) if peft else ours
    x, upstream = torch.randn(20, 32, dtype=torch.float64), torch.randn(20, 32, dtype=torch.float64)
    gradients(module, x, upstream)
    (view,) = lora_layers(nn.Sequential(module))
    gradient = upstream.t() @ x
    (found,) = projection_row_sq(project(*stacks([view]), BaseNorms())[0])
    torch.testing.assert_close(found, projected_rows(ours, gradient), rtol=1e-7, atol=0)
    assert found.sum() < gradient.square().sum()


def test_projected_gradient_of_a_hybrid_is_that_of_its_blocks():
    ours = layer("float64", m=32, n=32, r=8, k=4, hybrid_r=3)
    x, upstream = torch.randn(20, 32, dtype=torch.float64), torch.randn(20, 32, dtype=torch.float64)
    gradients(ours, x, upstream)
    (found,) = projection_row_sq(project(*stacks(lora_layers(nn.Sequential(ours))), BaseNorms())[0])
    torch.testing.assert_close(found, projected_rows(ours, upstream.t() @ x), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["float64", "nf4"])
@pytest.mark.parametrize("hybrid", [0, 4])
def test_ggpo_trains_at_the_perturbed_weight(kind, hybrid):
    model = nn.Sequential(layer(kind, m=64, n=64, hybrid_r=hybrid))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = GGPOOptimizer(torch.optim.SGD(parameters, lr=0.0), model, sigma=0.5, update_every=1, seed=1)
    x = torch.randn(3, 64, dtype=model[0].gralora_A.dtype)
    base = model[0].base
    dense = base.float_weight() if kind == "float64" else base.dense(torch.float32)
    draw = optimizer.current_perturbation()["0"]
    perturbed = draw_gaussian(draw, 64, dense, dense.dtype) + model[0].delta_weight()
    expected = F.linear(x, perturbed, model[0].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    optimizer.step()
    assert optimizer.method_state()["layers"]["0"]["grad_sq"] is not None
    assert not torch.allclose(model(x), expected, rtol=1e-2)
    reference = F.linear(x, dense + model[0].delta_weight(), model[0].bias)
    torch.testing.assert_close(model.eval()(x), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float64", "bf16", "conv1d", "nf4"])
@pytest.mark.parametrize("hybrid", [0, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
def test_ggpo_adds_its_noise_to_any_layer(kind, hybrid, dropout, noise):
    model = nn.Sequential(layer(kind, m=64, n=64, hybrid_r=hybrid, dropout=dropout))
    optimizer = GGPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, sigma=0.5, seed=1, noise=noise)
    dtype = {"float64": torch.float64, "bf16": torch.bfloat16}.get(kind, torch.float32)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)

    def outcome():
        torch.manual_seed(1)
        out = model(x)
        return out, *torch.autograd.grad(out.float().square().sum() / 2, [x, model[0].gralora_B])

    out, grad_x, grad_B = outcome()
    with optimizer.perturbed_as({}):
        clean, clean_x, clean_B = outcome()
    assert model.training and not torch.equal(grad_B, clean_B)
    epsilon = noise_of(optimizer, dtype=dtype).double()
    added = x.detach().double() @ epsilon.t()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]  # the loss is in float32
    assert (out - clean - added).norm() <= tolerance * added.norm()
    if dropout == 0:
        base = model[0].base.dense(torch.float32) if kind == "nf4" else model[0].base.float_weight()
        weight = (base + model[0].delta_weight()).double()
        for value, g, w in [(out, grad_x, weight + epsilon), (clean, clean_x, weight)]:
            assert (g - value.double() @ w).norm() <= tolerance * g.norm()


def test_an_auxiliary_climbs_beside_the_blocks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = layer(hybrid_r=2), layer(m=8, n=24)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    model = Net()
    x = torch.randn(5, 16, dtype=torch.float64)
    plain = model(x)
    primary = [p for p in model.parameters() if p.requires_grad]
    ascending = attach_auxiliary(model, r=2, seed=1)
    base = torch.optim.SGD([{"params": primary}, {"params": ascending, "ascent": True}], lr=0.1)
    optimizer = BiLoRAOptimizer(base, model, rho=0.05)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < optimizer.perturbation_norm() <= 0.05
    first, s = model.up, 2.0
    update = s * ascending[1] @ ascending[0]
    expected = F.linear(x, first.weight + first.delta_weight() + update, first.bias)
    torch.testing.assert_close(first(x), expected)
    torch.testing.assert_close(first.eval()(x), F.linear(x, first.weight + first.delta_weight(), first.bias))
    detach_auxiliary(model)
    assert not torch.allclose(model(x), plain)
