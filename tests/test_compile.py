"""Compiled models and torch.func's transforms: one graph for all steps, which computes what an eager model does."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from helpers import adamw, assert_near
from methods import KINDS, over
from models import trainable
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import flatlora

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.6 breaks the graph within PEFT; not tried between"),
]


class Net(nn.Module):
    def __init__(self, recompute: bool | None = None):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.reentrant = recompute

    def body(self, x):
        return self.down(torch.relu(self.up(x)))

    def forward(self, x):
        return self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)


def model_of(form: str = "lora", recompute: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = Net(recompute)
    if form == "lora":
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"]))
    else:
        hybrid_r = 2 if form == "hybrid" else 0
        flatlora.apply_gralora(model, ["up", "down"], r=4, k=2, alpha=8, hybrid_r=hybrid_r)
    for name, p in model.named_parameters():
        if "_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.train()


def compiled(model: nn.Module, backend: str = "aot_eager") -> tuple[nn.Module, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def batch(i: int) -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(i))


def step(forward, model, optimizer, i, autocast=False):
    """The output and the gradients of one training step."""
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        out = forward(batch(i))
    out.float().square().mean().backward()
    found = [out.detach(), *(p.grad.clone() for p in trainable(model) if p.grad is not None)]
    optimizer.step()
    optimizer.zero_grad()
    return found


def louder(optimizer) -> None:
    for name in ("sigma", "rho"):
        if hasattr(optimizer, name):
            setattr(optimizer, name, 0.2)


def run(kind, form="lora", compile=False, autocast=False, steps=4, backend="aot_eager", recompute=None):
    """What every step computed, with σ or ρ changed on the way, and how many graphs that took."""
    model = model_of(form, recompute)
    optimizer = over(kind, model, adamw)
    forward, counter = compiled(model, backend) if compile else (model, None)
    found = []
    for i in range(steps):
        found += step(forward, model, optimizer, i, autocast)
        if i == 1:
            louder(optimizer)
    return found, counter and counter.frame_count


# The noise is the same, drawn from the same seeds. What differs is the order in which products are added up, a few
# roundings of float32; autocast rounds some sums to bfloat16 that are not rounded eagerly, and one step is compared.
@pytest.mark.parametrize("form", ["lora", "hybrid"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_computes_what_eager_steps_compute(kind, form):
    expected, _ = run(kind, form)
    found, graphs = run(kind, form, compile=True)
    assert graphs == 1
    assert_near(found, expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind):
    expected, _ = run(kind, autocast=True, steps=1)
    found, graphs = run(kind, autocast=True, steps=1, compile=True)
    assert graphs == 1 and found[0].dtype == expected[0].dtype
    assert_near([one.float() for one in found], [one.float() for one in expected], 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "Bi-LoRA"])  # noise that operators draw, and factors
def test_through_inductor(kind):
    expected, _ = run(kind)
    found, graphs = run(kind, compile=True, backend="inductor")
    assert graphs == 1
    assert_near(found, expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_has_an_own_perturbation_and_passes_that_do_not_train_none(kind):
    model = model_of()
    optimizer = over(kind, model, adamw)
    forward, counter = compiled(model)
    for i in range(2):
        step(forward, model, optimizer, i)
    x = batch(9)
    first, expected, clean = forward(x), model(x), model.eval()(x)
    model.train()
    assert torch.equal(first, forward(x))
    y = x.clone().requires_grad_()
    with torch.no_grad():
        assert torch.allclose(forward(y), clean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(model(x), clean, rtol=1e-5, atol=1e-6)
    # The same graph within a reentrant checkpoint, whose second pass has gradients.
    assert torch.allclose(checkpoint(forward, y, use_reentrant=True), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first, clean, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # the weights as they were, the perturbation another one
        before = [p.clone() for p in trainable(model)]
    forward(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        for p, value in zip(trainable(model), before, strict=True):
            if kind != "Bi-LoRA":
                p.copy_(value)
    graphs = counter.frame_count
    assert not torch.allclose(forward(x), first, rtol=1e-6, atol=0)
    assert counter.frame_count == graphs
    model.eval()
    clean = model(x)
    assert torch.allclose(forward(x), clean, rtol=1e-5, atol=1e-6)
    model.train()
    assert not torch.allclose(forward(x), clean, rtol=1e-6, atol=0)
    assert counter.frame_count == graphs + 1


@pytest.mark.parametrize("kind", ["gaussian", "Bi-LoRA"])  # the second with parameters of its own on the model
def test_a_perturbation_that_is_taken_off_or_put_on_anew(kind):
    model = model_of()
    forward, _ = compiled(model)  # before there is an optimizer
    x, clean = batch(9), model(batch(9))
    assert torch.allclose(forward(x), clean, rtol=1e-5, atol=1e-6)
    for gone in ("removed", "collected"):
        optimizer = over(kind, model, adamw)
        for i in range(2):
            step(forward, model, optimizer, i)
        assert not torch.allclose(forward(x), model.eval()(x), rtol=1e-5, atol=1e-6)
        model.train()
        if gone == "removed":
            optimizer.remove()
        else:
            del optimizer
            gc.collect()
        assert torch.allclose(forward(x), model.eval()(x), rtol=1e-5, atol=1e-6)
        model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_see_the_same_perturbation(kind):
    expected, _ = run(kind)
    found, graphs = run(kind, compile=True, recompute=False)
    assert graphs == 1
    assert_near(found, expected, 1e-4)


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "hybrid"])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_functions(kind, form):
    model = model_of(form)
    optimizer = over(kind, model, adamw)
    for i in range(2):
        step(model, model, optimizer, i)
    x, direction = batch(9), batch(10)
    jacobian = torch.stack(
        [torch.autograd.grad(model(y := x[:1].clone().requires_grad_())[0, j], y)[0][0] for j in range(16)]
    )
    assert torch.allclose(torch.func.jvp(model, (x[:1],), (direction[:1],))[1], direction[:1] @ jacobian.t(), atol=1e-5)
    assert torch.allclose(torch.func.vmap(model)(x), model(x), rtol=1e-5, atol=1e-6)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    loss(dict(model.named_parameters()), x).backward()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    whole = torch.func.grad(loss)(parameters, x)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(whole[name], p.grad, rtol=1e-4, atol=1e-7)
            assert torch.allclose(each[name].mean(0), p.grad, rtol=1e-4, atol=1e-7)


def test_a_compiled_directional_derivative():
    """An operator would drop the tangent without a word."""
    model = model_of()
    optimizer = over("gaussian", model, adamw)
    step(model, model, optimizer, 0)

    def derivative(x):
        return torch.func.jvp(model, (x,), (x,))[1]

    torch._dynamo.reset()
    found = torch.compile(derivative, backend="aot_eager", fullgraph=True)(batch(9))
    assert torch.allclose(found, derivative(batch(9)), rtol=1e-5, atol=1e-6)
