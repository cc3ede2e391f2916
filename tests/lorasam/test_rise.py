"""LoRASAM whose ρ is chosen by how far ε raises the loss."""

import copy
import math

import pytest
import torch
from helpers import adapters, epsilon, wrapped
from models import MLP, peft
from torch import nn

from flatlora import LoRASAMOptimizer
from flatlora.lorasam.radius import FIRST, LARGEST, LEAST, Radius
from flatlora.reference import lorasam_radius


def lorasam(model, rise=0.01, lr=0.0, **options):
    return wrapped(LoRASAMOptimizer, model, lr, torch.optim.SGD, rise=rise, **options)


def adapted(seed=0):
    torch.manual_seed(seed)
    return peft(MLP(9, 11, 7), ["up", "down"])


def step(model, optimizer, seed=0, scale=1.0):
    """Takes a step, and returns how far ε raised its loss."""
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (scale * (model(x) - 0.4).square().mean()).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.nan_to_num_(0.0, 0.0, 0.0)  # which would leave nothing of the weights
    optimizer.step()
    optimizer.zero_grad()
    return float(optimizer.metrics()["loss_rise"])


def test_the_radius_is_that_of_its_formula():
    model = adapted()
    optimizer, rises = lorasam(model, lr=0.1), []
    for i in range(30):
        rise = step(model, optimizer, seed=i)
        rises += [rise] if i > 0 else []  # the first step has no ε
        rho = lorasam_radius(rises, 0.01)
        assert optimizer.rho == pytest.approx(rho, rel=1e-5)
        eps = torch.cat([value.flatten() for value in epsilon(model).values()])
        assert eps.norm().item() == pytest.approx(rho, rel=1e-5) == optimizer.perturbation_norm()
        metrics = optimizer.metrics()
        assert float(metrics["rho"]) == optimizer.rho
        assert float(metrics["perturbation_to_rho"]) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("rise", "grown"), [(-50.0, math.exp(0.1)), (50.0, math.exp(-0.1)), (0.01, 1.0)])
def test_a_step_changes_the_radius_by_a_tenth_at_most(rise, grown):
    radius = Radius(0.01)
    radius.see(torch.tensor(rise), torch.device("cpu"))
    radius.go_on(torch.tensor(True))
    assert float(radius.rho) == pytest.approx(FIRST)
    radius.advance()
    assert float(radius.rho) == pytest.approx(grown * FIRST)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_loss_rises_as_far_as_it_was_asked_to_whatever_its_scale(scale):
    model = adapted()
    optimizer = lorasam(model, rise=0.003 * scale)
    rises = [step(model, optimizer, scale=scale) for _ in range(150)]
    assert rises[-1] == pytest.approx(0.003 * scale, rel=0.02)
    assert 2 * LEAST < optimizer.rho < LARGEST / 2


def test_a_climbing_base_has_its_loss_lowered_by_as_much():
    model = adapted()
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, maximize=True)
    optimizer = LoRASAMOptimizer(base, model, rise=0.003)
    assert [step(model, optimizer) for _ in range(150)][-1] == pytest.approx(-0.003, rel=0.02)


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf])
def test_losses_that_are_zero_or_not_finite_leave_radius_and_perturbation(scale):
    model = adapted()
    optimizer = lorasam(model, rise=0.003, lr=1e-12)
    for _ in range(100):
        step(model, optimizer)
    settled = optimizer.rho
    for _ in range(30):
        step(model, optimizer, scale=scale)
        assert optimizer.rho == settled == pytest.approx(optimizer.perturbation_norm(), rel=1e-5)
    assert step(model, optimizer) == pytest.approx(0.003, rel=0.02)


@pytest.mark.parametrize("outlier", [100.0, -100.0, 1e30])
def test_it_recovers_from_a_single_large_rise(outlier):
    radius = Radius(0.01)
    slope = 0.2  # of the loss, so that ρ = 0.05 raises it by 0.01
    rises = []
    for i in range(200):
        rises.append(outlier if i == 60 else slope * float(radius.rho))
        radius.see(torch.tensor(rises[-1]), torch.device("cpu"))
        radius.go_on(torch.tensor(True))
        radius.advance()
        assert float(radius.rho) == pytest.approx(lorasam_radius(rises, 0.01), rel=1e-4)
        assert LEAST <= float(radius.rho) <= LARGEST
        if i == 59:
            assert float(radius.rho) == pytest.approx(0.05, rel=0.1)
    assert float(radius.rho) == pytest.approx(0.05, rel=0.1)


def test_adapters_that_rest_are_perturbed_as_far_as_the_others():
    model = adapted()
    model.add_adapter("b", model.peft_config["default"])
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.requires_grad_(True)
    base = torch.optim.SGD([p for name, p in model.named_parameters() if "lora_" in name], lr=0.01)
    optimizer = LoRASAMOptimizer(base, model, rise=0.003, adapter=["default", "b"])
    for name, steps in (("default", 3), ("b", 20), ("default", 0)):
        model.base_model.set_adapter(name)
        for p in (p for key, p in model.named_parameters() if "lora_" in key):
            p.requires_grad_(True)
        for i in range(steps):
            step(model, optimizer, seed=i)
    eps = torch.cat([value.flatten() for value in epsilon(model).values()])
    assert eps.norm().item() == pytest.approx(optimizer.rho, rel=1e-5)
    assert abs(optimizer.rho / FIRST - 1) > 0.3


def test_a_loss_that_can_hardly_be_raised_stops_at_the_largest_radius(caplog):
    model = adapted()
    optimizer = lorasam(model, rise=1e6)
    for _ in range(60):
        step(model, optimizer, scale=1e-4)
    assert optimizer.rho == pytest.approx(LARGEST) == optimizer.perturbation_norm()
    assert "next to nothing on this model, and rho is at its upper bound of 0.3" in caplog.text


@pytest.mark.parametrize("maximize", [False, True])
def test_a_resumed_run_is_the_same_to_the_bit(maximize):
    def start(model):
        params = [p for p in model.parameters() if p.requires_grad]
        return LoRASAMOptimizer(torch.optim.SGD(params, lr=0.01, maximize=maximize), model, rise=0.01)

    model = adapted()
    optimizer = start(model)
    for i in range(4):
        step(model, optimizer, seed=i)
    state, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    resumed = start(other)
    resumed.load_state_dict(state)
    for i in range(4, 8):
        assert step(model, optimizer, seed=i) == step(other, resumed, seed=i) and optimizer.rho == resumed.rho
    assert all(torch.equal(p, q) for p, q in zip(adapters(model).values(), adapters(other).values(), strict=True))
    resumed.load_state_dict(resumed.base_optimizer.state_dict())
    assert resumed.rho == pytest.approx(FIRST)


def test_a_compiled_model_has_the_same_radius():
    model, other = adapted(), adapted()
    optimizer, another = lorasam(model, lr=0.1), lorasam(other, lr=0.1)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for i in range(4):
        step(model, optimizer, seed=i)
        step(compiled, another, seed=i)
        assert another.rho == pytest.approx(optimizer.rho, rel=1e-5)


def test_the_checkpoints_rise_is_taken_over_and_told_of(caplog):
    state = lorasam(adapted(), rise=0.02).state_dict()
    optimizer = lorasam(adapted())
    optimizer.load_state_dict(state)
    assert optimizer.rise == 0.02 and "checkpoint's rise = 0.02, not 0.01" in caplog.text


@pytest.mark.parametrize("ours", [{"rise": 0.01}, {"rho": 0.1}])
def test_a_checkpoint_of_the_other_form_is_refused_and_nothing_is_changed(ours):
    theirs = {"rho": 0.2} if "rise" in ours else {"rise": 0.02}
    optimizer, foreign = wrapped(LoRASAMOptimizer, adapted(), **ours), wrapped(LoRASAMOptimizer, adapted(), **theirs)
    before = copy.deepcopy(optimizer.state_dict())
    ((name, value),) = theirs.items()
    with pytest.raises(ValueError, match=rf"written with {name}={value}.*build it with {name}={value}"):
        optimizer.load_state_dict(foreign.state_dict())
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    "broken",
    [{"numbers": torch.tensor(x)} for x in ([math.nan, 0.0, 1.0], [0.0, 0.0, 1.0], [0.1, 0.0])] + [{"rise": 0.0}],
)
def test_a_broken_checkpoint_is_refused(broken):
    optimizer = lorasam(adapted())
    state = optimizer.state_dict()
    state["flatlora"]["LoRASAMOptimizer"]["radius"].update(broken)
    with pytest.raises(ValueError, match=rf"state_dict's {next(iter(broken))} .*must be"):
        optimizer.load_state_dict(state)


def test_a_checkpoint_without_its_strength_is_refused():
    optimizer = lorasam(adapted())
    state = optimizer.state_dict()
    del state["flatlora"]["LoRASAMOptimizer"]["radius"]
    with pytest.raises(ValueError, match="LoRASAM part lacks rho"):
        optimizer.load_state_dict(state)


def test_wrong_calls_leave_the_model_as_it_was():
    model = adapted()
    base = torch.optim.SGD(nn.ParameterList(p for p in model.parameters() if p.requires_grad), lr=0.1)
    with pytest.raises(ValueError, match=r"rho=0\.1 and rise=0\.01: rise chooses rho"):
        LoRASAMOptimizer(base, model, rho=0.1, rise=0.01)
    for bad in (0, -0.1, math.inf, math.nan, "a"):
        with pytest.raises(ValueError, match="rise must be a finite number > 0"):
            LoRASAMOptimizer(base, model, rise=bad)
    optimizer = LoRASAMOptimizer(base, model)
    assert optimizer.rho == 0.05 and optimizer.rise is None and "rho" not in optimizer.metrics()
    with pytest.raises(ValueError, match="build the optimizer with rise"):
        optimizer.rise = 0.01
    optimizer.remove()
    optimizer = lorasam(adapted())
    with pytest.raises(ValueError, match=r"rise=0\.01 chooses it"):
        optimizer.rho = 0.1
    with pytest.raises(ValueError, match="rise must be"):
        optimizer.rise = -1
    optimizer.rise = 0.02
    assert optimizer.rise == 0.02 and optimizer.rho == pytest.approx(FIRST)


def test_a_step_that_fails_or_saw_no_perturbed_pass_leaves_the_radius():
    model = adapted()
    optimizer = lorasam(model, lr=0.1)
    for i in range(3):
        step(model, optimizer, seed=i)
    before = str(optimizer.state_dict()["flatlora"]["LoRASAMOptimizer"]["radius"])

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    optimizer.base_optimizer.step, kept = fails, optimizer.base_optimizer.step
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer)
    optimizer.base_optimizer.step = kept
    assert str(optimizer.state_dict()["flatlora"]["LoRASAMOptimizer"]["radius"]) == before
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.01) if p.requires_grad else None
    optimizer.step()
    assert str(optimizer.state_dict()["flatlora"]["LoRASAMOptimizer"]["radius"]) == before
