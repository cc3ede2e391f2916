"""Gradients of gradients through perturbed layers: `create_graph=True`, as gradient penalties use it."""

from __future__ import annotations

import pytest
import torch
from methods import KINDS, over
from models import MLP, trainable, trained
from peft import LoraConfig, get_peft_model
from torch import nn

import flatlora
from flatlora.kernels.blocks import AddBlocks, BlockOptions
from flatlora.kernels.low_rank import Added, AddedTerms

# Not DoRA, whose norm is a constant in PEFT's backward, while differences see it move.
FORMS = ["lora", "gralora", "hybrid", "dropout", "gralora dropout"]


def model_of(form, dtype=torch.float64):
    torch.manual_seed(0)
    model = MLP(6, 8, 4, bias=True).to(dtype)
    if form in ("gralora", "hybrid", "gralora dropout"):
        options = {"hybrid": {"hybrid_r": 2}, "gralora dropout": {"dropout": 0.5}}.get(form, {})
        flatlora.apply_gralora(model, ["up", "down"], r=4, k=2, alpha=8, **options)
    else:
        dropout = 0.5 if form == "dropout" else 0.0
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], lora_dropout=dropout)
        model = get_peft_model(model, config)
    for name, p in model.to(dtype).named_parameters():
        if "_B" in name:
            nn.init.normal_(p, std=0.3)
    return model.train()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_penalty_has_the_gradient_that_differences_have(kind, form):
    """The gradient of ``‖∂L/∂x‖² + ‖∂L/∂θ‖²`` along a direction of all parameters, at the perturbed weights."""
    model = model_of(form)
    optimizer = over(kind, model, sgd)
    data = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(2):
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    params = trained(model)
    # A perturbation that follows the weights, such as GGPO's, is that of the step.
    perturbed = optimizer.perturbed_as(optimizer.current_perturbation()) if kind != "Bi-LoRA" else None

    def penalty():
        torch.manual_seed(3)  # the same dropout
        x = data.clone().requires_grad_()
        grads = torch.autograd.grad(model(x).pow(3).mean(), [x, *params], create_graph=True)
        return torch.stack([grad.square().sum() for grad in grads]).sum()

    direction = [torch.randn_like(p) for p in params]
    with perturbed or torch.enable_grad():
        found = torch.autograd.grad(penalty(), params)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(params, direction, strict=True):
                    p.add_(d, alpha=sign * 1e-5)
            values.append(penalty().item())
            with torch.no_grad():
                for p, d in zip(params, direction, strict=True):
                    p.sub_(d, alpha=sign * 1e-5)
    slope = sum((grad * d).sum() for grad, d in zip(found, direction, strict=True)).item()
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("with_product", [True, False])
def test_second_derivatives_of_the_product_with_low_rank_terms(with_product):
    torch.manual_seed(0)
    W, C, D = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 6), (4, 2), (2, 6)))
    x, A, B, out = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (2, 6), (4, 2), (3, 4))
    )
    weight = (lambda weight: W) if with_product else None
    plan = AddedTerms(torch.float64, (0.7, 0.3), ((C, D),), (1.0,), weight)

    def run(out, x, A, B):
        return Added.apply(plan, out, x, None, None, A, B)

    assert torch.autograd.gradgradcheck(run, (out, x, A, B))


@pytest.mark.parametrize("with_product", [True, False])
def test_second_derivatives_of_the_product_with_blocks(with_product):
    torch.manual_seed(0)
    W, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x, A, B, out = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (2, 3, 4), (2, 4, 2), (3, 4))
    )

    def run(x, A, B, out):
        how = BlockOptions(0.7, torch.float64)
        return AddBlocks.apply(how, x, A, B, out, *((W, bias) if with_product else (None, None)))

    assert torch.autograd.gradgradcheck(run, (x, A, B, None if with_product else out))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_penalty_under_autocast(kind, form):
    model = model_of(form, torch.float32)
    optimizer = over(kind, model, sgd)
    x = torch.randn(5, 6)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

    def penalty_grads(autocast):
        torch.manual_seed(3)  # the same dropout
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(inputs)
        (grad,) = torch.autograd.grad(out.float().pow(3).mean(), inputs, create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(grad.square().sum(), trainable(model))])

    exact = penalty_grads(False)
    assert (penalty_grads(True) - exact).norm() < 0.05 * exact.norm()
