"""What a failing step leaves behind, and what is refused at once."""

from __future__ import annotations

import functools
import itertools
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from problems import SGD, Net, bilevel, difference, everything, levels, net_batch, peft_net, same, state_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatlora import (
    BilevelOptimizer,
    BiLoRAOptimizer,
    GGPOOptimizer,
    attach_auxiliary,
    direction_parameters,
    magnitude_parameters,
)


class Fault(Exception):
    pass


class Faults:
    """Where to fail next: ``where`` is one of the places below, ``after`` how many times it goes well before."""

    def __init__(self) -> None:
        self.where, self.after = "", 0

    def at(self, place: str) -> None:
        if place == self.where:
            self.after -= 1
            if self.after < 0:
                raise Fault(place)


class Rows(torch.utils.data.Dataset):
    def __init__(self, faults: Faults, name: str, size: int):
        self.faults, self.name, self.data = faults, name, [net_batch(1) for _ in range(size)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        self.faults.at(self.name)
        return {key: value[0] for key, value in self.data[i].items()}


class FaultyAdamW(torch.optim.AdamW):
    """Fails once it has moved everything."""

    def __init__(self, faults: Faults, name: str, params):
        super().__init__(params, lr=0.01)
        self.faults, self.name = faults, name

    def step(self, closure=None):
        super().step(closure)
        self.faults.at(self.name)


def faulty(kind: str, difference: str, fed: bool = False):
    """A problem in which everything that can fail does so when it is told to."""
    model, faults = peft_net(dropout=0.3), Faults()
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    directions = direction_parameters(model)
    if kind == "bilora":
        ascent = {"params": attach_auxiliary(model, r=2, seed=1), "ascent": True}
        lower = BiLoRAOptimizer(FaultyAdamW(faults, "lower", [{"params": directions}, ascent]), model, rho=0.3)
    else:
        lower = FaultyAdamW(faults, "lower", directions)
        lower = GGPOOptimizer(lower, model, sigma=0.2, beta=0.5, seed=2) if kind == "ggpo" else lower
    train, val = (
        DataLoader(Rows(faults, name, size), 2, shuffle=True) for name, size in (("train data", 6), ("val data", 4))
    )

    def loss_fn(model, data):
        faults.at("forward")
        loss = model(**data).loss
        loss.register_hook(lambda grad: faults.at("backward"))
        return loss

    upper = FaultyAdamW(faults, "upper", magnitude_parameters(model))
    arguments = {"loss_fn": loss_fn, "difference": difference, "orthogonality": 1e-3, "unroll_steps": 2}
    optimizer = BilevelOptimizer(lower, upper, model, None if fed else train, val, **arguments)
    return model, optimizer, faults, train


PASSES = {"lower": 0, "second lower": 1, "validation": 2, "difference": 3, "second difference": 4}
PLACES = [
    *((f"{name} {way}", way, after) for name, after in PASSES.items() for way in ("forward", "backward")),
    ("lower.step", "lower", 0),
    ("second lower.step", "lower", 1),
    ("upper.step", "upper", 0),
    ("training data", "train data", 0),
    ("second batch of training data", "train data", 2),
    ("validation data", "val data", 1),
]


@functools.cache
def four_steps(kind):
    """The losses of steps in which nothing fails, and all there is after them."""
    model, optimizer, _, _ = faulty(kind, "central")
    return [optimizer.step() for _ in range(4)], everything(model, optimizer)


@pytest.mark.parametrize("kind", ["ggpo", "bilora"])
@pytest.mark.parametrize("where", [row[0] for row in PLACES])
def test_a_step_that_fails_leaves_everything_as_before(where, kind):
    """And so, tried again, it is the step that it would have been."""
    _, place, after = next(row for row in PLACES if row[0] == where)
    model, optimizer, faults, _ = faulty(kind, "central")
    optimizer.step()
    before = everything(model, optimizer)
    faults.where, faults.after = place, after
    with pytest.raises(Fault):
        optimizer.step()
    assert difference(before, everything(model, optimizer)) is None
    faults.where = ""
    again = [optimizer.step() for _ in range(3)]
    losses, end = four_steps(kind)
    assert losses[1:] == again
    assert difference(end, everything(model, optimizer)) is None


@pytest.mark.parametrize("kind", ["ggpo", "bilora"])
@pytest.mark.parametrize(("wrong", "which"), enumerate(["training", "training", "validation"]))
def test_a_loss_that_is_not_finite_leaves_everything_as_before(wrong, which, kind):
    """Though it is read once both levels have been through their passes, and V has moved along gradients of nan."""
    model, optimizer, _, _ = faulty(kind, "central")
    optimizer.step()
    before, loss_fn, passes = everything(model, optimizer), optimizer.loss_fn, itertools.count()
    optimizer.loss_fn = lambda model, data: loss_fn(model, data) * (float("nan") if next(passes) == wrong else 1.0)
    with pytest.raises(ValueError, match=f"the {which} loss is nan"):
        optimizer.step()
    assert difference(before, everything(model, optimizer)) is None


@pytest.mark.parametrize("kind", ["ggpo", "bilora"])
@pytest.mark.parametrize("place", ["val data", "backward", "lower", "upper"])
def test_a_step_of_a_loop_that_fails_can_be_tried_again(place, kind):
    def train(failing: bool):
        model, optimizer, faults, data = faulty(kind, "forward", fed=True)
        torch.manual_seed(6)
        for i, part in enumerate([*data, *data][:4]):
            optimizer.zero_grad()
            model(**part).loss.backward()
            if failing and i in (1, 3):
                before = everything(model, optimizer)
                faults.where, faults.after = place, 0
                with pytest.raises(Fault):
                    optimizer.step()
                assert difference(before, everything(model, optimizer)) is None
                faults.where = ""
            optimizer.step()
        return everything(model, optimizer)

    assert difference(train(False), train(True)) is None


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["ggpo", "bilora"])
@pytest.mark.parametrize("place", ["forward", "backward", "second", "train data", "scheduler"])
def test_a_step_of_phase_two_that_fails_leaves_everything_as_before(place, kind, first):
    def train(failing: bool):
        model, optimizer, faults, data = faulty(kind, "central")
        optimizer.step()
        second = FaultyAdamW(faults, "second", direction_parameters(model))
        scheduler = SimpleNamespace(step=lambda: faults.at("scheduler"))
        losses = [] if first else optimizer.retrain(data, 2, optimizer=second, scheduler=scheduler)
        if failing:
            before = everything(model, optimizer)
            faults.where, faults.after = place, 0
            with pytest.raises(Fault):
                optimizer.retrain(data, 3, optimizer=second, scheduler=scheduler)
            assert difference(before, everything(model, optimizer)) is None
            assert optimizer.phase == (1 if first else 2) and (second.state == {}) == first
            faults.where = ""
        losses += optimizer.retrain(data, 3, optimizer=second, scheduler=scheduler)
        return losses, everything(model, optimizer)

    assert difference(train(False), train(True)) is None


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["ggpo", "bilora"])
def test_a_hypergradient_that_fails_leaves_everything_as_before(kind, way):
    model, optimizer, faults, _ = faulty(kind, "central")
    optimizer.step()
    before, (train, val) = everything(model, optimizer), (net_batch(2), net_batch(2))
    torch.set_rng_state(before["streams"][0])
    for after in range(4):
        faults.where, faults.after = way, after
        with pytest.raises(Fault):
            optimizer.hypergradient(train, val)
        assert difference(before, everything(model, optimizer)) is None


@pytest.mark.parametrize("level", ["train", "val"])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, data: model(x=data["x"], labels=data["labels"]).loss.expand(2), "scalar"),
        (lambda model, data: float(model(**data).loss), "scalar"),
        (lambda model, data: model(**data).loss * float("nan"), "loss is nan"),
        (lambda model, data: model(**data).loss * float("inf"), "loss is inf"),
        (lambda model, data: model(**data).loss.detach(), "does not depend"),
        (lambda model, data: model(x=data["x"]).loss, "labels"),
    ],
)
def test_bad_losses(level, loss_fn, message):
    model, good, bad = peft_net(), net_batch(), net_batch()

    def choose(model, data):
        return loss_fn(model, data) if data["x"] is bad["x"] else model(**data).loss

    before = state_of(model)
    optimizer = bilevel(model, *([[bad], [good]] if level == "train" else [[good], [bad]]), loss_fn=choose)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert same(before, state_of(model))


def test_validation_batches_without_labels():
    model, good = peft_net(), net_batch()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"validation batch .*labels"):
        bilevel(model, [good], [{"x": good["x"]}]).step()
    with pytest.raises(ValueError, match="pass loss_fn"):
        bilevel(model, [good], [(good["x"], good["labels"])]).step()
    assert same(before, state_of(model))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(model=peft_net(dora=False)), ValueError, "use_dora=True"),
        (lambda a: a.update(lower=a["upper"]), ValueError, "overlap"),
        (lambda a: a.update(lower=a["upper"], upper=a["lower"]), ValueError, "swapped"),
        (lambda a: a.update(lower=SGD([nn.Parameter(torch.ones(1))], lr=1.0)), ValueError, "not in the model"),
        (
            lambda a: a.update(
                upper=SGD(direction_parameters(a["model"])[:1], 1), lower=SGD(direction_parameters(a["model"])[1:], 1)
            ),
            ValueError,
            "not magnitudes",
        ),
        (
            lambda a: a.update(
                lower=SGD(magnitude_parameters(a["model"])[:1], 1), upper=SGD(magnitude_parameters(a["model"])[1:], 1)
            ),
            ValueError,
            "belong to upper",
        ),
        (lambda a: a.update(lower=torch.optim.AdamW), TypeError, "lower must be"),
        (lambda a: a.update(upper=3), TypeError, "upper must be"),
        (lambda a: a.update(model="model"), TypeError, "Module"),
        (lambda a: a.update(train=[]), ValueError, "train_dataloader yields no batch"),
        (
            lambda a: a.update(val=DataLoader(TensorDataset(torch.ones(3)), batch_size=4, drop_last=True)),
            ValueError,
            "val_dataloader yields no batch",
        ),
        (lambda a: a.update(val=None), TypeError, "val_dataloader must be"),
        (lambda a: a.update(train=iter([1])), TypeError, "iterator"),
        (lambda a: a.update(xi=-1.0), ValueError, "xi, if not 'lr', must"),
        (lambda a: a.update(xi=True), ValueError, "xi, if not 'lr', must"),
        (lambda a: a.update(unroll_steps=True), ValueError, "unroll_steps must"),
        (lambda a: a.update(epsilon=True), ValueError, "epsilon must"),
        (lambda a: a.update(orthogonality=False), ValueError, "orthogonality must"),
        (lambda a: a.update(xi="learning rate"), ValueError, "xi, if not 'lr', must"),
        (lambda a: a.update(unroll_steps=0), ValueError, "unroll_steps must"),
        (lambda a: a.update(difference="backward"), ValueError, "difference must"),
        (lambda a: a.update(epsilon=0.0), ValueError, "epsilon must"),
        (lambda a: a.update(orthogonality=float("nan")), ValueError, "orthogonality must"),
        (lambda a: a.update(adapter="other"), ValueError, "other"),
        (lambda a: a.update(loss_fn=3), TypeError, "loss_fn must"),
    ],
)
def test_bad_arguments(change, error, message):
    model = peft_net()
    arguments = dict(
        zip(("lower", "upper"), levels(model), strict=True), model=model, train=[net_batch()], val=[net_batch()]
    )
    before = state_of(model)
    change(arguments)
    order = [arguments.pop(name) for name in ("lower", "upper", "model", "train", "val")]
    with pytest.raises(error, match=message):
        BilevelOptimizer(*order, **arguments)
    assert same(before, state_of(model))


def test_the_same_dataloader_twice_warns():
    data = [net_batch()]
    with pytest.warns(UserWarning, match="same object"):
        bilevel(peft_net(), data, data)


def test_parameters_of_a_model_without_magnitudes():
    for find in (direction_parameters, magnitude_parameters):
        for model in (peft_net(dora=False), Net()):
            with pytest.raises(ValueError, match="use_dora=True"):
                find(model)
