"""How long a perturbation lives: in no copy, no longer than its optimizer, and removable in any order."""

from __future__ import annotations

import copy
import gc
import random

import pytest
import torch
from helpers import adamw, difference, sgd, through_a_file
from methods import (
    METHODS,
    OF_PEFT,
    PERTURBING,
    adapted,
    batch,
    every_method,
    load_weights,
    logits,
    plain,
    started,
    train,
    twin,
    weights,
)
from models import trained

import flatlora

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": lambda model: through_a_file(model, weights_only=False),  # which pickles
}


def trains_as(model, other):
    """Where two models that are trained by plain optimizers first differ; None if they don't."""
    runs = []
    for which in (model, other):
        loss = which.train()(**batch(9)).loss
        loss.backward()
        first = [logits(which), loss.detach(), [p.grad for p in trained(which)]]
        for p in which.parameters():
            p.grad = None
        runs.append((first, train(which, plain(which, sgd), range(3)), weights(which), logits(which)))
    return difference(*runs)


# --- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
@every_method()
def test_a_copy_of_the_model_is_a_plain_model(method, how):
    model, optimizer = started(method)
    before = logits(model)
    other = COPIES[how](model)
    assert difference(before, logits(model)) is None
    assert trains_as(other, twin(model, method)) is None
    assert difference(before, logits(model)) is None
    train(model, optimizer, range(2, 3))  # the original goes on


@pytest.mark.parametrize("how", COPIES)
@every_method()
def test_a_copy_of_model_and_optimizer_goes_on_alike(method, how):
    model, optimizer = started(method)
    other, its = COPIES[how]((model, optimizer))
    held = {id(p) for group in its.param_groups for p in group["params"]}
    assert held <= {id(p) for p in other.parameters()}
    assert train(other, its, range(2, 5)) == train(model, optimizer, range(2, 5))
    assert difference(weights(model), weights(other)) is None
    assert difference(optimizer.state_dict(), its.state_dict()) is None
    assert difference(logits(model), logits(other)) is None


# --- the end of an optimizer --------------------------------------------------------------------------------------


@every_method()
def test_without_its_optimizer_the_model_is_a_plain_one(method):
    model, optimizer = started(method)
    other = twin(model, method)
    del optimizer
    gc.collect()
    assert trains_as(model, other) is None


@every_method()
def test_a_new_optimizer_takes_the_place_of_one_that_is_gone(method):
    model, optimizer = started(method)
    own = weights(model)
    del optimizer
    gc.collect()
    again = method.start(model, adamw)
    found = train(model, again, range(4))

    other = adapted(method)
    load_weights(other, own)
    its = method.start(other, adamw)
    assert found == train(other, its, range(4))
    assert difference(weights(model), weights(other)) is None
    assert difference(logits(model), logits(other)) is None


@every_method(among=PERTURBING)
def test_a_second_optimizer_takes_over_and_the_first_says_so(method):
    model, first = started(method)
    own = weights(model)
    second = method.start(model, adamw)
    other = adapted(method)
    load_weights(other, own)
    its = method.start(other, adamw)
    assert train(model, second, range(3)) == train(other, its, range(3))
    with pytest.raises(RuntimeError, match="built later"):
        first.step()


@every_method("GraLoRA")
def test_after_remove_the_model_is_as_it_came(method):
    fresh = shape(adapted(method))
    for how in (
        lambda optimizer, model: optimizer.remove(),
        lambda optimizer, model: flatlora.remove_perturbation(model),
    ):
        model, optimizer = started(method)
        own = twin(model, method)
        how(optimizer, model)
        assert difference(logits(model), logits(own)) is None
        optimizer.remove()
        flatlora.remove_perturbation(model)
        assert difference(fresh, shape(model)) is None
        assert trains_as(model, own) is None


@every_method("Bi-LoRA", among=PERTURBING)  # whose base has other groups
def test_after_remove_the_optimizer_goes_on_as_its_base(method):
    model, optimizer = started(method)
    other = twin(model, method)
    base = plain(other, adamw)
    base.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))
    optimizer.remove()
    assert train(model, optimizer, range(2, 4)) == train(other, base, range(2, 4))
    assert difference(weights(model), weights(other)) is None
    assert difference(logits(model), logits(other)) is None


# --- any order ----------------------------------------------------------------------------------------------------


def shape(model):
    """What a model is made of beside the values of its parameters: modules, attributes, hooks, names."""
    found = {}
    for name, module in model.named_modules():
        attributes = {
            key: value if isinstance(value, bool | int | float | str) else type(value).__name__
            for key, value in module.__dict__.items()
        }
        counts = {key: len(value) for key, value in module.__dict__.items() if isinstance(value, dict)}
        found[name] = {"type": type(module).__name__, "attributes": attributes, "counts": counts}
    hooks = {name: len(p._post_accumulate_grad_hooks or ()) for name, p in model.named_parameters()}
    return {"modules": found, "state_dict": sorted(model.state_dict()), "hooks": hooks}


class Session:
    """One user's model on which GGPO and an auxiliary come and go."""

    def __init__(self, model):
        self.model = model
        self.ggpo = self.bilora = None
        self.auxiliary = False

    def attach_ggpo(self):
        if self.ggpo is None:
            self.ggpo = flatlora.GGPOOptimizer(adamw(trained(self.model)), self.model, sigma=0.3, seed=1)

    def attach_auxiliary(self):
        if not self.auxiliary:
            self.group = flatlora.attach_auxiliary(self.model, r=4, seed=1)
            self.auxiliary = True

    def wrap_auxiliary(self):
        if self.auxiliary and self.bilora is None:
            groups = [{"params": trained(self.model)}, {"params": self.group, "ascent": True}]
            self.bilora = flatlora.BiLoRAOptimizer(adamw(groups), self.model, rho=0.5)

    def remove_ggpo(self):
        if self.ggpo is not None:
            self.ggpo.remove()
            self.ggpo = None

    def drop_ggpo(self):
        self.ggpo = None
        gc.collect()

    def remove_bilora(self):
        if self.bilora is not None:
            self.bilora.remove()

    def drop_bilora(self):
        if self.bilora is not None:
            self.bilora = None
            gc.collect()
            self.detach()

    def detach(self):
        flatlora.detach_auxiliary(self.model)
        self.bilora, self.auxiliary = None, False

    def remove_all(self):
        flatlora.remove_perturbation(self.model)
        self.ggpo = self.bilora = None
        self.auxiliary = False

    def step(self):
        for optimizer in (self.ggpo, self.bilora):
            if optimizer is not None:
                train(self.model, optimizer, range(1), micro=1)

    def evaluate(self):
        if not any(repacking(self.model)):  # or this CPU might be asked for what it can't do
            self.model.eval()
            with torch.no_grad():
                logits(self.model)
            self.model.train()


MOVES = [name for name in vars(Session) if not name.startswith("_")]


def repacking(model):
    """Whether each 4-bit layer would be repacked for inference by its next evaluation, and never be trained again."""
    name = "support_avx512bf16_for_cpu"
    return [getattr(module, name) for module in model.modules() if hasattr(module, name)]


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("adapters", ["Bi-LoRA", "GraLoRA"])
def test_any_order_of_attach_and_remove_ends_with_a_clean_model(request, adapters, quant):
    method = next(method for method in METHODS if method.name == adapters)
    size = {"quant": quant, "width": 64 if quant else 32}
    if quant:
        request.getfixturevalue("repacks")
    chance = random.Random(f"{adapters} {quant}")
    for trial in range(6):
        model = adapted(method, **size)
        logits(model)
        fresh = shape(model)
        session = Session(model)
        moves = chance.choices(MOVES, k=10)
        for move in moves:
            getattr(session, move)()
            assert (session.ggpo is None and not session.auxiliary) or not any(repacking(model)), (trial, moves, move)
        chance.choice([session.remove_all, lambda s=session: (s.remove_ggpo(), s.detach())])()
        assert difference(fresh, shape(model)) is None, (trial, moves)
        assert difference(logits(model), logits(twin(model, method, **size))) is None, (trial, moves)


@pytest.fixture
def repacks(monkeypatch):
    """As on a CPU where bitsandbytes repacks; nothing may be evaluated, as this one may not know how."""
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


@every_method(among=[method for method in PERTURBING if method in OF_PEFT])
def test_the_layout_of_4_bit_weights_is_held_as_long_as_the_optimizer_lives(repacks, method):
    model = adapted(method, quant="nf4", width=64)
    assert all(repacking(model))
    optimizer = method.start(model, adamw)
    train(model, optimizer, range(1))
    assert not any(repacking(model))
    del optimizer
    gc.collect()
    flatlora.detach_auxiliary(model)
    assert all(repacking(model))


@pytest.mark.parametrize("first_off", ["ggpo", "auxiliary"])
@pytest.mark.parametrize("first_on", ["ggpo", "auxiliary"])
def test_the_layout_of_4_bit_weights_is_held_while_anything_is_attached(repacks, first_on, first_off):
    session = Session(adapted(METHODS[0], quant="nf4", width=64))
    on = {"ggpo": session.attach_ggpo, "auxiliary": session.attach_auxiliary}
    off = {"ggpo": session.remove_ggpo, "auxiliary": session.detach}
    for attach in (on.pop(first_on), *on.values()):
        attach()
        assert not any(repacking(session.model))
    off.pop(first_off)()
    assert not any(repacking(session.model))
    next(iter(off.values()))()
    assert all(repacking(session.model))
