"""Base optimizers that wrap another, and so have states of their own form: resumed to the bit wherever the bare one is.

And what else a state must not depend on: a shallow copy of the optimizer, and torch's default dtype.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adamw, adapters, closure_of, difference, loss_of, sgd, through_a_file
from models import lora_mlp, trainable

from flatlora import (
    BilevelOptimizer,
    BiLoRAOptimizer,
    GGPOOptimizer,
    LoRASAMOptimizer,
    MethodState,
    OptimizerWrapper,
    apply_gralora,
    direction_parameters,
    magnitude_parameters,
)

kozistr = pytest.importorskip("pytorch_optimizer")
pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")

SGD = torch.optim.SGD


BASES = {
    "Lookahead": lambda params: kozistr.Lookahead(adamw(params), k=2),
    "Lookahead, pullback": lambda params: kozistr.Lookahead(sgd(params), k=2, pullback_momentum="pullback"),
    "ScheduleFreeWrapper": lambda params: kozistr.ScheduleFreeWrapper(SGD(params, lr=0.05)),
    "TRAC": lambda params: kozistr.TRAC(adamw(params), s_prev=0.5),
    "OrthoGrad": lambda params: kozistr.OrthoGrad(adamw(params)),
    "PCGrad": lambda params: kozistr.PCGrad(sgd(params)),
    "Magma": lambda params: kozistr.Magma(adamw(params)),
    "SAM": lambda params: kozistr.SAM(params, SGD, lr=0.05, momentum=0.9),
    "LookSAM": lambda params: kozistr.LookSAM(params, SGD, lr=0.05, momentum=0.9),
    "WSAM": lambda params: kozistr.WSAM(torch.nn.Identity(), params, SGD, lr=0.05, momentum=0.9),
    "FriendlySAM": lambda params: kozistr.FriendlySAM(params, SGD, lr=0.05, momentum=0.9),
}
WITH_CLOSURE = ("SAM", "LookSAM", "WSAM", "FriendlySAM")  # of two passes, which no method of one pass goes with
OF_OWN_FORM = ("Lookahead", "Lookahead, pullback", "ScheduleFreeWrapper")

METHODS = {
    "bare": lambda model, base: base(trainable(model)),
    "OptimizerWrapper": lambda model, base: OptimizerWrapper(base(trainable(model))),
    "GGPO": lambda model, base: GGPOOptimizer(base(trainable(model)), model, sigma=0.2, seed=7),
    "LoRASAM": lambda model, base: LoRASAMOptimizer(base(trainable(model)), model),
    "Bi-LoRA": lambda model, base: BiLoRAOptimizer.for_model(model, lambda groups: base(groups), rho=0.5, seed=3),
    "stack": lambda model, base: OptimizerWrapper(GGPOOptimizer(base(trainable(model)), model, sigma=0.2, seed=7)),
}


CASES = [
    (name, method)
    for name in BASES
    for method in METHODS
    if name not in WITH_CLOSURE or method in ("bare", "OptimizerWrapper")
]


def start(name, method):
    model = lora_mlp()
    optimizer = METHODS[method](model, BASES[name])
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return model, optimizer


def train(model, optimizer, steps, name):
    torch.manual_seed(steps[0])  # of what a base optimizer draws
    for i in steps:
        closure = closure_of(optimizer, lambda i=i: loss_of(model, i))
        closure()
        optimizer.step(*([closure] if name in WITH_CLOSURE else []))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one(name, method):
    model, optimizer = start(name, method)
    train(model, optimizer, range(3), name)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    other, resumed = start(name, method)
    train(other, resumed, range(7, 8), name)  # what is loaded replaces a state
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for one in ((model, optimizer), (other, resumed)):
        train(*one, range(3, 8), name)
    assert difference(adapters(model), adapters(other)) is None
    assert difference(optimizer.state_dict(), resumed.state_dict()) is None


@pytest.mark.parametrize("name", OF_OWN_FORM)
def test_a_checkpoint_of_the_bare_base_is_taken(name, caplog):
    bare = start(name, "bare")
    train(*bare, range(3), name)
    model, optimizer = start(name, "GGPO")
    model.load_state_dict(bare[0].state_dict())
    optimizer.load_state_dict(bare[1].state_dict())
    assert "starts afresh" in caplog.text
    assert difference(bare[1].state_dict(), optimizer.base_optimizer.state_dict()) is None


@pytest.mark.parametrize("method", ["OptimizerWrapper", "GGPO", "LoRASAM", "Bi-LoRA", "stack"])
@pytest.mark.parametrize("name", OF_OWN_FORM)
def test_a_state_that_the_base_can_not_load_is_refused_and_changes_nothing(name, method):
    model, optimizer = start(name, method)
    train(model, optimizer, range(2), name)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 3), name)
    before = copy.deepcopy(optimizer.state_dict())
    for part in [key for key in saved if key.endswith("_state") or key == "base_optimizer"]:
        with pytest.raises(ValueError, match=part if method != "Bi-LoRA" else f"{part}|ascend"):
            optimizer.load_state_dict({key: value for key, value in saved.items() if key != part})
    assert difference(before, optimizer.state_dict()) is None


def test_ascent_is_looked_for_in_the_groups_of_the_inner_base():
    _, optimizer = start("Lookahead", "Bi-LoRA")
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["base_optimizer"]["param_groups"]:
        group.pop("ascent", None)
    with pytest.raises(ValueError, match="ascend"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("name", OF_OWN_FORM)
def test_the_methods_part_alone(name):
    model, optimizer = start(name, "GGPO")
    train(model, optimizer, range(3), name)
    _, other = start(name, "GGPO")
    base = copy.deepcopy(other.base_optimizer.state_dict())
    MethodState(other).load_state_dict(through_a_file(MethodState(optimizer).state_dict()))
    assert difference(optimizer.method_state(), other.method_state()) is None
    assert difference(base, other.base_optimizer.state_dict()) is None


# --- on two levels ------------------------------------------------------------------------------------------------


def bilevel(lower, upper, second="Lookahead"):
    model = lora_mlp(use_dora=True)
    below = GGPOOptimizer(BASES[lower](direction_parameters(model)), model, sigma=0.1, seed=1)
    levels = below, BASES[upper](magnitude_parameters(model))
    loaders = [[*range(5)], [*range(10, 13)]]
    optimizer = BilevelOptimizer(*levels, model, *loaders, loss_fn=loss_of, unroll_steps=2)
    optimizer.train()
    return model, optimizer, BASES[second](direction_parameters(model))


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(name, "OrthoGrad") for name in BASES if name not in WITH_CLOSURE]
    + [("OrthoGrad", name) for name in (*OF_OWN_FORM, "TRAC")]
    + [("Lookahead", "Lookahead, pullback"), ("TRAC", "TRAC")],
)
def test_a_resumed_run_on_two_levels_is_the_uninterrupted_one(lower, upper):
    model, optimizer, _ = bilevel(lower, upper)
    for _ in range(3):
        optimizer.step()
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    groups = saved[1]["param_groups"]
    numbers = [i for group in groups for i in group["params"]]
    assert numbers == list(range(len(trainable(model)))) and all(key in numbers for key in saved[1]["state"])
    torch.manual_seed(5)  # of what a base optimizer draws
    straight = [optimizer.step() for _ in range(4)]

    other, resumed, _ = bilevel(lower, upper)
    resumed.step()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.manual_seed(5)
    assert [resumed.step() for _ in range(4)] == straight
    assert difference(adapters(model), adapters(other)) is None
    assert difference(optimizer.state_dict(), resumed.state_dict()) is None


@pytest.mark.parametrize("second", [*OF_OWN_FORM, "TRAC"])
def test_the_second_phase_goes_on_with_such_a_base(second):
    def begin():
        model, optimizer, base = bilevel("OrthoGrad", "PCGrad", second)
        if callable(getattr(base, "train", None)):
            base.train()
        return model, optimizer, base

    data = [*range(20, 24)]
    model, optimizer, base = begin()
    optimizer.step()
    optimizer.retrain(data, 3, optimizer=base)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    straight = optimizer.retrain(data, 4, optimizer=base)
    other, resumed, base = begin()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert resumed.retrain(data, 4, optimizer=base) == straight
    assert difference(adapters(model), adapters(other)) is None


def test_two_levels_refuse_the_state_of_another_kind_of_base():
    (_, written, _), (_, optimizer, _) = bilevel("OrthoGrad", "PCGrad"), bilevel("OrthoGrad", "Lookahead")
    written.step()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="lookahead_state"):
        optimizer.load_state_dict(written.state_dict())
    assert difference(before, optimizer.state_dict()) is None


# --- shallow copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["OptimizerWrapper", "GGPO", "LoRASAM", "Bi-LoRA", "stack"])
def test_a_shallow_copy_is_the_same_optimizer(method):
    runs = []
    for copied in (False, True):
        model, optimizer = start("OrthoGrad", method)
        train(model, optimizer, range(2), "OrthoGrad")
        other = copy.copy(optimizer) if copied else optimizer
        assert type(other) is type(optimizer) and other.param_groups is optimizer.param_groups
        train(model, other, range(2, 4), "OrthoGrad")
        train(model, optimizer, range(4, 6), "OrthoGrad")
        runs.append((adapters(model), copy.deepcopy(optimizer.state_dict())))
        assert difference(other.state_dict(), optimizer.state_dict()) is None
        del other
        train(model, optimizer, range(6, 7), "OrthoGrad")
    assert difference(*runs) is None


# --- torch's default dtype ----------------------------------------------------------------------------------------


def run_under(dtype, method):
    """Weights, losses and metrics of a run that is built and made while torch's default dtype is `dtype`."""
    torch.manual_seed(0)
    batches = torch.randn(6, 2, 4, 32)
    model = lora_mlp(use_dora=True)
    losses = []

    def loss_fn(model, i):
        loss = (model(batches[i][0]) - batches[i][1]).square().mean()
        losses.append(loss.item())
        return loss

    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(1)
        if method == "BiDoRA":
            levels = sgd(direction_parameters(model)), sgd(magnitude_parameters(model))
            optimizer = BilevelOptimizer(*levels, model, [0, 1], [2], loss_fn=loss_fn)
        else:
            optimizer = METHODS[method](model, adamw)
        begun = optimizer.metrics()
        for i in range(3):
            if method != "BiDoRA":
                loss_fn(model, i).backward()
            optimizer.step()
            optimizer.zero_grad()
        metrics = optimizer.metrics()
        if method == "BiDoRA":
            optimizer.retrain([3, 4, 5], 2, optimizer=adamw(direction_parameters(model)))
    finally:
        torch.set_default_dtype(torch.float32)
    return adapters(model), losses, begun, metrics


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["GGPO", "LoRASAM", "Bi-LoRA", "BiDoRA"])
def test_the_default_dtype_changes_nothing(method, dtype):
    assert difference(run_under(torch.float32, method), run_under(dtype, method)) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_change_where_gralora_begins(dtype):
    found = []
    for default in (torch.float32, dtype):
        net = torch.nn.Sequential(torch.nn.Linear(32, 32))
        torch.set_default_dtype(default)
        try:
            torch.manual_seed(1)
            found.append(trainable(apply_gralora(net, "all-linear", r=4, k=2, hybrid_r=2)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert difference(*found) is None
