"""What is left after a fault in a step: everything as before the call, and a second try that is as if none had been."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adapters, base_state, closure_of, difference
from methods import METHODS, Method, adapted, attach_auxiliary, batch, bilora, every_method, logits, lora
from models import trainable
from torch import nn

from flatlora import GGPOOptimizer


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


def both(model, base, seed):
    return GGPOOptimizer(bilora(model, base, seed), model, sigma=0.3, beta=1.0, seed=seed)


# BiDoRA's step has no closure, and calls its model and its bases itself: tests/bidora has its faults.
IN_A_LOOP = [
    *(method for method in METHODS if method.name not in ("BiDoRA", "GraLoRA")),
    Method("GGPO over Bi-LoRA", lora, both, before_wrapping=attach_auxiliary),
]


def innermost(optimizer):
    while hasattr(optimizer, "base_optimizer"):
        optimizer = optimizer.base_optimizer
    return optimizer


def a_step(model, optimizer, i, closed=False):
    closure = closure_of(optimizer, lambda: model(**batch(i)).loss)
    if not closed:
        closure()
    optimizer.step(closure if closed else None)


def raises(*args, **kwargs):
    raise Fault


class InTheUpdate:
    def __init__(self, model, optimizer):
        self.base = innermost(optimizer)
        self.base.fails = True

    def remove(self):
        self.base.fails = False


def in_forward(model, optimizer):
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return last.register_forward_hook(raises)


PLACES = {
    "forward": in_forward,
    "backward": lambda model, optimizer: trainable(model)[0].register_hook(raises),
    "update": InTheUpdate,
    "step hook": lambda model, optimizer: optimizer.register_step_pre_hook(raises),
}


def everything(model, optimizer):
    own = copy.deepcopy(optimizer.state_dict().get("flatlora"))
    return adapters(model), logits(model), base_state(optimizer), own


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("place", PLACES)
@every_method(among=IN_A_LOOP)
def test_a_fault_leaves_everything_as_before_and_a_second_try_succeeds(method, place, closed):
    model, twin = adapted(method), adapted(method)
    optimizer, other = (method.start(which, lambda params: Base(params, lr=1e-2)) for which in (model, twin))
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
