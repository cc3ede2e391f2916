"""GGPOOptimizer: what its noise depends on, its cost, options, state and metrics. Its row scales: test_row_std.py."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Living, at_step, dense, gradient_rows, noise_of, step, wrapped
from models import MLP, TWO, Net, fc, one_layer, peft, quantised, trainable
from torch import nn

from flatlora import GGPOOptimizer, weight_noise

KINDS = ["gaussian", "low_rank"]


def ggpo(model, lr=0.0, base=torch.optim.SGD, **options):
    return wrapped(GGPOOptimizer, model, lr, base, **{"seed": 3, **options})


def only(stds):
    (std,) = stds.values()
    return std


def batch(rows=5, n=7):
    return torch.randn(rows, n, dtype=torch.float64)


# --- the noise ----------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_step_and_layer():
    def noises(seed, steps=2):
        torch.manual_seed(4)
        model = peft(MLP(6, 6, 6), ["up", "down"])
        optimizer = ggpo(model, seed=seed)
        found = []
        for _ in range(steps):
            found += [noise_of(optimizer, name) for name in gradient_rows(optimizer)]
            step(model, optimizer, torch.randn(3, 6, dtype=torch.float64))
        return found

    first, again, other = noises(1), noises(1), noises(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({float(noise[0, 0]) for noise in first}) == 4
    torch.manual_seed(21)
    default = GGPOOptimizer(torch.optim.SGD(trainable(model := one_layer()), 0.1), model)
    assert default.method_state()["seed"] == 21


def loss_rises(kind, rank, draws):
    """Rises of ½‖x·(W' + ε − W')ᵀ‖² over draws of ε, and their expectation ½ Σ d_i²·tr H_ii."""
    torch.manual_seed(0)
    model = one_layer(32, 48, bias=False)
    x = torch.randn(64, 48, dtype=torch.float64) * torch.linspace(2, 0.05, 48).double()  # some directions are sharper
    optimizer = ggpo(model, sigma=0.1, noise=kind, noise_rank=rank, perturb_no_grad=True)
    weight, _ = dense(fc(model))
    target = x @ weight.t().detach()
    std = only(optimizer.row_std())
    expected = 0.5 * float(std.square().sum() * x.square().sum())
    rises = []
    with torch.no_grad():
        for t in range(draws):
            at_step(optimizer, t)
            rises.append(0.5 * float((model(x) - target).square().sum()))
    return torch.tensor(rises), expected


def test_both_kinds_raise_a_quadratic_loss_by_the_same_amount():
    spreads = {}
    for kind, rank in [("gaussian", 1), *(("low_rank", k) for k in (1, 2, 4, 8, 16, 32))]:
        rises, expected = loss_rises(kind, rank, draws=800)
        error = float(rises.std()) * len(rises) ** -0.5
        assert abs(float(rises.mean()) - expected) < 4 * error and error < 0.05 * expected
        spreads[kind, rank] = float(rises.std()) / expected
    full = spreads.pop(("gaussian", 1))
    print(f"spread of the loss rise relative to its mean: gaussian {full:.3f}")
    for (_, rank), spread in spreads.items():
        print(f"  rank {rank:2}: {spread:.3f}, {spread / full:.2f} times gaussian's")
    ordered = list(spreads.values())
    assert ordered == sorted(ordered, reverse=True) and ordered[-1] > full


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("form", ["float32", "conv1d", "bfloat16", "int8"])
def test_a_step_makes_nothing_of_the_weights_size(form, noise):
    m, n = 1024, 768
    if form == "int8":
        model = Net(quantised(nn.Linear(n, m), "int8"))
        model.is_loaded_in_8bit = True
        model = peft(model, ["fc"], None)
    elif form == "bfloat16":
        model = peft(Net(nn.Linear(n, m).bfloat16()), ["fc"], None)
    else:
        model = one_layer(m, n, conv1d=form == "conv1d", dtype=torch.float32)
    optimizer = ggpo(model, 1e-3, torch.optim.AdamW, noise=noise)
    x = torch.randn(2, n, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
    for _ in range(2):
        model(x).float().square().mean().backward()
        with Living() as living:  # the second time ‖W0_i‖² is known
            optimizer.step()
            optimizer.row_std()
        optimizer.zero_grad()
    assert 0 < living.largest < m * n // 2


# --- the passes that it perturbs ----------------------------------------------------------------------------------


def test_of_two_adapters_the_passes_of_its_own_are_perturbed():
    model = one_layer(adapters=TWO)
    model.base_model.set_adapter("first")
    optimizer = ggpo(model, sigma=0.5, adapter="first")
    x = batch()
    for active, perturbed in (("first", True), ("second", False), (["first", "second"], True)):
        model.base_model.set_adapter(active)
        weight, bias = dense(fc(model))
        expected = F.linear(x, weight + noise_of(optimizer) if perturbed else weight) + bias
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


# --- gradients that are not finite, and steps that are skipped ----------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_non_finite_gradients_leave_the_norms_as_they_were(value, first):
    model = peft(MLP(7, 8, 6), ["up", "down"])
    optimizer = ggpo(model, beta=1.0)
    x = batch()
    if not first:
        step(model, optimizer, x)
    before = optimizer.row_std()
    model(x).square().mean().backward()
    with torch.no_grad():
        model.base_model.model.up.lora_A["default"].weight.grad[0, 0] = value
    bits = [p.detach().clone() for p in trainable(model)]
    optimizer.step()  # the base optimizer spreads what is not finite, whatever its learning rate
    with torch.no_grad():
        for p, value in zip(trainable(model), bits, strict=True):
            p.copy_(value)
    after = optimizer.row_std()
    assert all(torch.equal(before[name], after[name]) for name in before)
    optimizer.zero_grad()
    step(model, optimizer, x)
    assert all(std.isfinite().all() for std in optimizer.row_std().values())
    assert any(not torch.equal(before[name], std) for name, std in optimizer.row_std().items())


def test_non_finite_weights_give_no_nan_in_the_noise():
    model = one_layer()
    optimizer = ggpo(model)
    with torch.no_grad():
        fc(model).lora_B["default"].weight[2] = float("nan")
        fc(model).lora_B["default"].weight[3] = float("inf")
    std = only(optimizer.row_std())
    assert std.isfinite().all() and (std[:2] > 0).all()


def test_a_step_without_gradients_keeps_the_norms():
    model = one_layer()
    optimizer = ggpo(model, beta=1.0)
    step(model, optimizer, batch())
    before = only(optimizer.row_std())
    optimizer.step()
    assert torch.equal(only(optimizer.row_std()), before)


# --- wrong calls --------------------------------------------------------------------------------------------------


BAD_OPTIONS = [
    ({"sigma": -0.1}, ["sigma", "-0.1"]),
    ({"sigma": 1e155}, ["sigma", "1e+155"]),
    ({"sigma": True}, ["sigma", "True"]),
    ({"sigma": float("nan")}, ["sigma", "nan"]),
    ({"sigma": float("inf")}, ["sigma", "inf"]),
    ({"sigma": "0.1"}, ["sigma", "'0.1'"]),
    ({"sigma": None}, ["sigma", "None"]),
    ({"beta": -1}, ["beta", "-1"]),
    ({"beta": float("nan")}, ["beta", "nan"]),
    ({"beta": float("inf")}, ["beta", "inf"]),
    ({"beta": "big"}, ["beta", "'big'"]),
    ({"noise": "uniform"}, ["'gaussian'", "'low_rank'", "'uniform'"]),
    ({"noise": "low_rank", "noise_rank": 0}, ["noise_rank", "0"]),
    ({"noise": "low_rank", "noise_rank": 2.5}, ["noise_rank", "2.5"]),
    ({"update_every": 0}, ["update_every", "0"]),
    ({"update_every": 2.5}, ["update_every", "2.5"]),
    ({"adapter": "other"}, ["'other'", "'default'"]),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options_are_refused_and_nothing_is_attached(options, words):
    model = one_layer()
    base = torch.optim.SGD(trainable(model), lr=0.1)
    with pytest.raises(ValueError) as raised:
        GGPOOptimizer(base, model, **options)
    for word in words:
        assert word in str(raised.value)
    assert_untouched(model, base)


def assert_untouched(model, base):
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert type(base.step.__func__) is type(lambda: None) and not base.state and len(base.param_groups) == 1


def foreign_parameters():
    model = one_layer()
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1), model


def no_adapters():
    model = MLP()
    return torch.optim.SGD(model.parameters(), lr=0.1), model


def a_class():
    return torch.optim.AdamW, one_layer()


def not_a_model():
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1), "model"


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (foreign_parameters, ValueError, ["SGD holds 1 parameters", "lora_A", "1 adapted layers", "requires_grad"]),
        (no_adapters, ValueError, ["MLP has no adapted linear layer", "get_peft_model"]),
        (a_class, TypeError, ["AdamW", "build it first", "AdamW(params"]),
        (lambda: (None, one_layer()), TypeError, ["torch.optim.Optimizer", "None"]),
        (not_a_model, TypeError, ["torch.nn.Module", "str"]),
    ],
)
def test_wrong_objects_are_refused_and_nothing_is_attached(build, error, words):
    base, model = build()
    with pytest.raises(error) as raised:
        GGPOOptimizer(base, model)
    for word in words:
        assert word in str(raised.value)
    if isinstance(base, torch.optim.Optimizer) and isinstance(model, nn.Module):
        assert_untouched(model, base)


def test_measuring_noise_does_not_stand_in_the_way():
    model = one_layer()
    with weight_noise(model, 0.1):
        optimizer = ggpo(model)
    assert only(optimizer.row_std()).min() > 0


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: peft(MLP(7, 7, 7), ["up"]), ["another model", "fc", "up"]),
        (lambda: one_layer(r=3), ["another model", "fc", "{'default': 3}", "{'default': 4}"]),
        (lambda: one_layer(m=11), ["another model", "fc", "[11, 7]", "[10, 7]"]),
    ],
    ids=["other layers", "other rank", "other shape"],
)
def test_a_state_of_another_model_is_refused_in_words(other, words):
    optimizer, foreign = ggpo(one_layer()), ggpo(other())
    with pytest.raises(ValueError) as raised:
        optimizer.load_state_dict(foreign.state_dict())
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_a_state_whose_deviations_are_damaged_is_refused_and_changes_nothing(wrong):
    model = one_layer()
    optimizer = ggpo(model, sigma=0.2, update_every=4)
    step(model, optimizer, batch())
    state, before = optimizer.state_dict(), only(optimizer.row_std())
    state["flatlora"]["GGPOOptimizer"]["layers"]["base_model.model.fc"]["std"][3] = wrong
    with pytest.raises(ValueError, match="must be finite and >= 0"):
        optimizer.load_state_dict(state)
    assert torch.equal(only(optimizer.row_std()), before)


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_are_the_expected_noise_and_the_gradients_share_of_it():
    model = one_layer()
    optimizer = ggpo(model, sigma=0.5, beta=2.0)
    assert optimizer.metrics() == {}
    x = batch(6)
    step(model, optimizer, x)
    model(x)
    weight, _ = dense(fc(model))
    grad_sq = float(only(gradient_rows(optimizer)).sum())
    weight_sq = float(weight.square().sum())
    found = optimizer.metrics()
    assert float(found["gradient_share"]) == pytest.approx(2 * grad_sq / (weight_sq + 2 * grad_sq), rel=1e-6)
    expected = 0.5 * ((weight_sq + 2 * grad_sq) / weight_sq) ** 0.5
    assert float(found["noise_to_weight"]) == pytest.approx(expected, rel=1e-6)
    assert found["noise_to_weight"] == pytest.approx(noise_rms(optimizer, weight), rel=0.5)


def test_metrics_after_a_step_are_those_of_its_passes():
    """The step's own gradients, much larger than those that scaled its noise, and a new σ are not in that noise."""
    model = one_layer()
    optimizer = ggpo(model, sigma=0.5, beta=100.0)
    x = batch(6)
    for target in (0.0, 100.0):
        (model(x) - target).square().mean().backward()
        before = optimizer.metrics()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.sigma = 0.3
        after = optimizer.metrics()
        ratios = ("noise_to_weight", "gradient_share")
        assert [float(before[name]) for name in ratios] == [float(after[name]) for name in ratios]
        assert 0 <= float(after["gradient_share"]) < 1
    assert float(after["gradient_share"]) > 0.1
    assert float(after["noise_to_weight"]) == pytest.approx(0.3 * (1 - float(after["gradient_share"])) ** -0.5)


def noise_rms(optimizer, weight):
    """One draw's ‖ε‖ over ‖W'‖."""
    return float(noise_of(optimizer).norm() / weight.norm())


# --- over the whole model in one call ------------------------------------------------------------------------------


def test_for_model_is_the_constructor_over_all_that_requires_a_gradient():
    results = []
    for build in (
        lambda model: GGPOOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, sigma=0.3, seed=1, weight_decay=0.1),
        lambda model: GGPOOptimizer(
            torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1), model, sigma=0.3, seed=1
        ),
    ):
        torch.manual_seed(0)
        model = one_layer()
        optimizer = build(model)
        for i in range(3):
            step(model, optimizer, torch.full((2, 7), float(i), dtype=torch.float64))
        results.append([p.detach() for p in trainable(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_for_model_keeps_given_groups_and_refuses_what_nobody_knows():
    model = one_layer()
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(trainable(model), 1)]
    with pytest.raises(TypeError, match="momentun"):
        GGPOOptimizer.for_model(model, torch.optim.SGD, params=groups, lr=1.0, momentun=0.9)
    with pytest.raises(TypeError, match="optimizer_cls must be a class"):
        GGPOOptimizer.for_model(model, torch.optim.SGD(trainable(model), lr=1.0))
    assert "forward" not in fc(model).__dict__
    optimizer = GGPOOptimizer.for_model(model, torch.optim.SGD, params=groups, lr=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


# --- groups that come later ---------------------------------------------------------------------------------------


def test_a_group_that_comes_while_an_adapter_is_frozen_takes_nothing_away():
    model = one_layer(adapters=TWO)
    frozen = [p for name, p in model.named_parameters() if "second" in name]
    for p in model.parameters():
        p.requires_grad_(any(part in name for name, q in model.named_parameters() if q is p for part in TWO))
    optimizer = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model)
    names = {layer.name: layer.names for layer in optimizer._source.layers.values()}
    for p in frozen:
        p.requires_grad_(False)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert names == {layer.name: layer.names for layer in optimizer._source.layers.values()}
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})  # no adapter is trained at present
    assert len(optimizer.param_groups) == 3


def test_an_optimizer_that_was_removed_takes_groups_and_claims_nothing():
    model = one_layer(adapters=TWO)
    first = [p for name, p in model.named_parameters() if "first" in name]
    second = [p.requires_grad_(True) for name, p in model.named_parameters() if "second" in name]
    one = GGPOOptimizer(torch.optim.SGD(first, lr=0.1), model)
    one.remove()
    other = GGPOOptimizer(torch.optim.SGD(second, lr=0.1), model, adapter="second")
    one.add_param_group({"params": second})
    other.step()
    assert len(one.param_groups) == 2 and one.metrics() == {}


def test_layers_of_one_plain_name_are_all_perturbed():
    inner = one_layer()

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.module = one_layer(), inner

    model = Both()
    optimizer = ggpo(model)
    assert len(optimizer.row_std()) == len(optimizer._attachment.layers) == 2
