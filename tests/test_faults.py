"""What is left after a fault in a step: everything as before the call, and a second try that is as if none had been."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adapters, base_state, difference, loss_of, outputs
from models import lora_mlp, trainable
from torch import nn

from flatlora import BiLoRAOptimizer, GGPOOptimizer, apply_gralora


class Fault(Exception):
    """Raised by the tests alone."""


class Base(torch.optim.AdamW):
    """Fails on demand before it moves anything."""

    fails = False

    def step(self, closure=None):
        loss = None if closure is None else closure()
        if self.fails:
            raise Fault
        super().step()
        return loss


def ggpo(noise):
    def build():
        model = lora_mlp()
        return model, GGPOOptimizer(Base(trainable(model), lr=1e-2), model, sigma=0.3, beta=1.0, noise=noise, seed=1)

    return build


def bilora():
    model = lora_mlp()
    return model, BiLoRAOptimizer.for_model(model, Base, lr=1e-2, rho=0.1, seed=1)


def both():
    model, inner = bilora()
    return model, GGPOOptimizer(inner, model, sigma=0.3, beta=1.0, seed=1)


def gralora():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    model = apply_gralora(model, ["0", "2"], r=4, k=2).train()
    return model, GGPOOptimizer(Base(trainable(model), lr=1e-2), model, sigma=0.3, beta=1.0, seed=1)


METHODS = {
    "gaussian": ggpo("gaussian"),
    "low_rank": ggpo("low_rank"),
    "bilora": bilora,
    "both": both,
    "gralora": gralora,
}


def innermost(optimizer):
    while hasattr(optimizer, "base_optimizer"):
        optimizer = optimizer.base_optimizer
    return optimizer


def a_step(model, optimizer, i, closed=False):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, i)
        loss.backward()
        return loss

    if not closed:
        closure()
    optimizer.step(closure if closed else None)


def raises(*args, **kwargs):
    raise Fault


def in_forward(model, optimizer):
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return last.register_forward_hook(raises)


def in_backward(model, optimizer):
    handle = trainable(model)[0].register_hook(raises)
    return handle


class Off:
    def __init__(self, base):
        self.base = base

    def remove(self):
        self.base.fails = False


def in_the_update(model, optimizer):
    innermost(optimizer).fails = True
    return Off(innermost(optimizer))


def in_a_step_hook(model, optimizer):
    return optimizer.register_step_pre_hook(raises)


PLACES = {"forward": in_forward, "backward": in_backward, "update": in_the_update, "step hook": in_a_step_hook}


def everything(model, optimizer):
    state = optimizer.state_dict()
    return adapters(model), outputs(model), base_state(optimizer), copy.deepcopy(state.get("flatlora"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_a_fault_leaves_everything_as_before_and_a_second_try_succeeds(method, place, closed):
    model, optimizer = METHODS[method]()
    twin, other = METHODS[method]()
    for i in range(2):
        a_step(model, optimizer, i)
        a_step(twin, other, i)
    before = everything(model, optimizer)
    handle = PLACES[place](model, optimizer)
    with pytest.raises(Fault):
        a_step(model, optimizer, 2, closed)
    handle.remove()
    optimizer.zero_grad()
    assert difference(before, everything(model, optimizer)) is None
    for i in range(2, 4):
        a_step(model, optimizer, i, closed)
        a_step(twin, other, i, closed)
    assert difference(everything(twin, other), everything(model, optimizer)) is None
