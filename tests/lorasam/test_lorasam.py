"""LoRASAMOptimizer against dense float64 references, and what it must leave alone."""

import copy

import pytest
import torch
from helpers import (
    adamw,
    adapters,
    computing,
    dense,
    difference,
    epsilon,
    noise_of,
    projection,
    wrapped,
)
from methods import train
from models import (
    MLP,
    TWO,
    Net,
    ParameterLoRA,
    lora_modules,
    one_layer,
    peft,
    quantised_mlp,
    randomise,
    tiny_llama,
    trainable,
)
from peft import GraloraConfig, get_peft_model
from torch import nn

from flatlora import GGPOOptimizer, LoRASAMOptimizer, apply_gralora, lora_layers


def lorasam(model, lr=0.0, base=torch.optim.SGD, rho=0.3, **options):
    return wrapped(LoRASAMOptimizer, model, lr, base, rho=rho, **options)


def adapted(model):
    """Adapted modules by name, hand-made ones included."""
    return {layer.name: layer.module for layer in lora_layers(model)}


def batch(model, rows=6, seed=0):
    n = next(iter(lora_layers(model))).shape[1]
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model, x, target=0.4):
    return (model(x) - target).square().mean()


def step(model, optimizer, x, scale=1.0):
    (scale * loss_of(model, x)).backward()
    optimizer.step()
    optimizer.zero_grad()


# --- dense references ---------------------------------------------------------------------------------------------


def dense_pass(model, x, eps):
    """A pass at W' + ε in dense weights: leaves gradients in the parameters; returns each layer's P(G)."""
    leaves, weights = {}, {}
    for name, module in adapted(model).items():
        weight, bias = dense(module)
        leaves[name] = (eps[name].to(weight.dtype) if eps else torch.zeros_like(weight)).detach().requires_grad_()
        weights[module] = weight + leaves[name], bias
    with computing(weights):
        loss_of(model, x).backward()
    return {name: projection(module, leaves[name].grad) for name, module in adapted(model).items()}


def normalised(parts, rho):
    norm = torch.stack([part.square().sum() for part in parts.values()]).sum().sqrt()
    return {name: rho * part / norm for name, part in parts.items()}, norm.item()


def assert_same(found, expected, rtol=1e-7):
    assert found.keys() == expected.keys()
    size = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=rtol, atol=rtol * size)


# --- ε ------------------------------------------------------------------------------------------------------------


def rank_deficient():
    model = peft(MLP(9, 11, 7), ["up", "down"])
    with torch.no_grad():
        for module in lora_modules(model).values():
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a[1], a[3] = a[0], 0
            b[:, 2] = -2 * b[:, 0]
    return model


def fresh():
    """B = 0, as PEFT initialises it."""
    model = peft(MLP(9, 11, 7), ["up", "down"])
    for module in lora_modules(model).values():
        nn.init.zeros_(module.lora_B["default"].weight)
    return model


def gralora(k=2, r=4, hybrid_r=0, dtype=torch.float64):
    model = apply_gralora(MLP(8, 12, 8, bias=True).to(dtype), "all-linear", r=r, k=k, alpha=6, hybrid_r=hybrid_r)
    for name, p in model.named_parameters():
        if "gralora_B" in name:
            nn.init.normal_(p, 0, 0.3)
    return model.train()


FORMS = {
    "lora": lambda: peft(MLP(9, 11, 7, bias=True), ["up", "down"]),
    "one form": lambda: peft(MLP(9, 9, 9), ["up", "down"]),
    "rslora": lambda: one_layer(use_rslora=True),
    "dora": lambda: peft(MLP(9, 11, 7), ["up", "down"], use_dora=True),
    "conv1d": lambda: one_layer(conv1d=True),
    "two adapters": lambda: peft(MLP(9, 11, 7), ["up", "down"], adapters=TWO),
    "B = 0": fresh,
    "rank-deficient": rank_deficient,
    "r > min(m, n)": lambda: one_layer(4, 3, r=8),
    "hand-made": lambda: Net(ParameterLoRA(10, 7).double()),
    "hand-made transposed": lambda: Net(ParameterLoRA(10, 7, transposed=True).double()),
    "gralora": gralora,
    "gralora, k = 4": lambda: gralora(k=4, r=8),
    "gralora, hybrid": lambda: gralora(hybrid_r=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_epsilon_is_the_normalised_projection_of_the_last_gradient(form):
    """ρ·P(G)/‖P(G)‖ over all layers, of the gradient at W' + ε: G by autograd, P with pseudo-inverses."""
    torch.manual_seed(0)
    model = FORMS[form]()
    expected = None
    # Directions that a step makes a millionth as large as others are none to the projection.
    optimizer = lorasam(model, lr=0.0 if form == "rank-deficient" else 0.05)
    assert optimizer.perturbation_norm() == 0 == float(optimizer.metrics()["perturbation_to_rho"])
    for t in range(3):
        x = batch(model, seed=t)
        twin = copy.deepcopy(model)
        parts = dense_pass(twin, x, expected)
        step(model, optimizer, x)
        expected, norm = normalised(parts, 0.3)
        assert_same(epsilon(model), expected)
        metrics = optimizer.metrics()
        assert float(metrics["projected_gradient_norm"]) == pytest.approx(norm, rel=1e-7)
        assert float(metrics["perturbation_to_rho"]) == pytest.approx(1, rel=1e-7)
        assert optimizer.perturbation_norm() == pytest.approx(0.3, rel=1e-7)


def test_epsilon_of_pefts_gralora():
    torch.manual_seed(0)
    ours = gralora(r=4, k=2)
    config = GraloraConfig(r=4, gralora_k=2, alpha=6, target_modules=["up", "down"])
    theirs = get_peft_model(copy.deepcopy(MLP(8, 12, 8, bias=True)).double(), config, autocast_adapter_dtype=False)
    inner = theirs.base_model.model
    with torch.no_grad():
        for name in ("up", "down"):
            a, b = getattr(ours, name), getattr(inner, name)
            b.base_layer.load_state_dict(a.base_layer.state_dict())
            b.gralora_A["default"].copy_(a.gralora_A)
            b.gralora_B["default"].copy_(a.gralora_B)
    theirs.train()
    x = batch(ours)
    mine, other = lorasam(ours), lorasam(theirs)
    step(ours, mine, x)
    step(theirs, other, x)
    found = {name.removeprefix("base_model.model."): value for name, value in epsilon(theirs).items()}
    assert_same(found, epsilon(ours))


@pytest.mark.parametrize("form", ["lora", "dora", "two adapters", "gralora"])
def test_the_loss_rises_to_first_order_by_rho_times_the_norm(form):
    torch.manual_seed(0)
    model = FORMS[form]()
    optimizer, x = lorasam(model, rho=1e-4), batch(model)
    step(model, optimizer, x)
    rise = loss_of(model, x).item() - loss_of(model.eval(), x).item()
    assert rise == pytest.approx(1e-4 * float(optimizer.metrics()["projected_gradient_norm"]), rel=1e-2)


def test_steepest_among_perturbations_of_its_norm():
    """No other ε of its norm in the tangent space raises the loss as much, nor does the direct step in A and B."""
    torch.manual_seed(0)
    model = FORMS["lora"]()
    optimizer, x = lorasam(model, rho=1e-4), batch(model)
    loss_of(model, x).backward()
    modules = lora_modules(model)
    factors = {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in modules.items()}
    others = [{name: b.detach() @ a.grad + b.grad @ a.detach() for name, (a, b) in factors.items()}]
    for _ in range(20):
        noise = {name: (torch.randn_like(a), torch.randn_like(b)) for name, (a, b) in factors.items()}
        others.append({name: (b @ noise[name][0] + noise[name][1] @ a).detach() for name, (a, b) in factors.items()})
    optimizer.step()
    clean = loss_of(model.eval(), x).item()
    rise = loss_of(model.train(), x).item() - clean
    for other in others:
        parts, _ = normalised(other, 1e-4)
        weights = {module: (dense(module)[0] + parts[name], module.bias) for name, module in modules.items()}
        with computing(weights):
            assert abs(loss_of(model, x).item() - clean) < 0.99 * rise


@pytest.mark.parametrize("form", ["lora", "dora", "gralora"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_thirty_steps_are_those_of_a_dense_reference(form, base):
    torch.manual_seed(0)
    model = FORMS[form]()
    reference = copy.deepcopy(model)
    optimizer, theirs = lorasam(model, lr=0.02, base=base), base(trainable(reference), lr=0.02)
    eps = None
    for t in range(30):
        x = batch(model, seed=t)
        step(model, optimizer, x)
        parts = dense_pass(reference, x, eps)
        theirs.step()
        theirs.zero_grad()
        eps, _ = normalised(parts, 0.3)
    for p, q in zip(trainable(model), trainable(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    assert_same(epsilon(model), eps, 1e-6)


def test_ill_conditioned_factors_survive_bfloat16():
    """Columns of B that differ by a hundredth: ε in half precision is still ε, to that precision."""
    torch.manual_seed(0)
    model = one_layer(96, 80, dtype=torch.float32)
    with torch.no_grad():
        b = model.base_model.model.fc.lora_B["default"].weight
        b.copy_(b[:, :1] + 1e-2 * b)
    x = torch.randn(12, 80)
    parts = dense_pass(copy.deepcopy(model).double(), x.double(), None)
    expected, _ = normalised(parts, 0.3)
    optimizer = lorasam(model)
    step(model, optimizer, x)
    (adapter,) = optimizer.current_perturbation().values()
    found = adapter.scaling * adapter.B.bfloat16().double() @ adapter.A.bfloat16().double()
    (expected,) = expected.values()
    assert (found - expected).norm() < 0.01 * expected.norm()


# --- gradients: their scale, and steps without usable ones ----------------------------------------------------------


def test_the_scale_of_the_gradient_does_not_matter():
    def eps(scale=1.0, clip=None):
        torch.manual_seed(0)
        model = FORMS["lora"]()
        optimizer = lorasam(model)
        (scale * loss_of(model, batch(model))).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        return epsilon(model)

    plain = eps()
    for other in (eps(1000.0), eps(1e-6), eps(clip=1e-3)):
        assert_same(other, plain, 1e-10)


@pytest.mark.parametrize("form", ["lora", "gralora"])
def test_under_autocast(form):
    """bfloat16 products, but an ε of norm ρ, up to their rounding."""
    torch.manual_seed(0)
    model = gralora(dtype=torch.float32) if form == "gralora" else peft(MLP(8, 12, 8), ["up", "down"], torch.float32)
    optimizer, x = lorasam(model, rho=10.0), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, x)
    loss.backward()
    optimizer.step()
    exact = epsilon(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = epsilon(model)
    assert torch.stack([part.square().sum() for part in exact.values()]).sum().sqrt() == pytest.approx(10.0, rel=1e-5)
    assert_same(rounded, exact, 3e-2)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_gradients_without_a_direction_keep_epsilon(value):
    torch.manual_seed(0)
    model = FORMS["lora"]()
    optimizer, x = lorasam(model), batch(model)
    (loss_of(model, x) * value).backward()  # before there is any
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.perturbation_norm() == 0
    randomise(model)  # a step of lr 0 makes NaN of A and B where gradients are infinite
    assert all(float(value.abs().max()) < 1e-14 for value in epsilon(model).values())
    step(model, optimizer, x)
    before = optimizer.method_state()["layers"]
    loss_of(model, x).backward()
    for p in trainable(model):
        p.grad.mul_(value) if value == 0 else p.grad[0].fill_(value)
    optimizer.step()
    assert difference(before, optimizer.method_state()["layers"]) is None


def test_who_maximizes_meets_the_opposite_epsilon():
    """Training by the loss turned around, with `maximize`, is the same training."""
    ends = []
    for maximize in (False, True):
        torch.manual_seed(0)
        model = one_layer()
        base = torch.optim.SGD(trainable(model), lr=0.05, maximize=maximize)
        optimizer = LoRASAMOptimizer(base, model, rho=0.3)
        for i in range(4):
            step(model, optimizer, batch(model, seed=i), scale=-1.0 if maximize else 1.0)
        ends.append([p.detach().clone() for p in trainable(model)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_multiplier_that_climbs_does_not_turn_epsilon():
    directions = []
    for climbs in (False, True):
        torch.manual_seed(0)
        model = one_layer()
        multiplier = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        groups = [{"params": trainable(model)}, {"params": [multiplier], "maximize": climbs}]
        optimizer = LoRASAMOptimizer(torch.optim.SGD(groups, lr=0.0), model, rho=0.3)
        step(model, optimizer, batch(model))
        directions.append(epsilon(model))
    assert difference(*directions) is None


def test_steps_without_gradients_keep_epsilon_and_say_so_once(caplog):
    model = FORMS["lora"]()
    optimizer, x = lorasam(model), batch(model)
    step(model, optimizer, x)
    before = epsilon(model)
    for _ in range(2):
        optimizer.step()
    assert difference(before, epsilon(model)) is None
    assert caplog.text.count("no adapter gradients") == 1


def test_a_layer_that_the_loss_did_not_pass_through_has_no_part_in_epsilon():
    torch.manual_seed(0)
    model = FORMS["one form"]()
    optimizer, x = lorasam(model), batch(model)
    step(model, optimizer, x)
    inner = model.base_model.model
    inner.up(x).square().mean().backward()
    optimizer.step()
    found = epsilon(model)
    (up,) = (value for name, value in found.items() if name.endswith("up"))
    (down,) = (value for name, value in found.items() if name.endswith("down"))
    assert float(up.norm()) == pytest.approx(0.3, rel=1e-7) and float(down.abs().max()) < 1e-14


@pytest.mark.parametrize("form", ["lora", "gralora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases(kind, form):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = quantised_mlp(kind)
    if form == "gralora":
        model = apply_gralora(model.unload(), "all-linear", r=8, k=2, alpha=16).train()
    optimizer = lorasam(model, rho=3.0)
    x = torch.randn(8, 64)
    for _ in range(2):
        step(model, optimizer, x)
    found = {}
    for name, adapter in optimizer.current_perturbation().items():
        grid = adapter.B @ adapter.A * adapter.scaling
        found[name] = grid if grid.dim() == 2 else grid.transpose(1, 2).flatten(2).flatten(0, 1)
    assert optimizer.perturbation_norm() == pytest.approx(3.0, rel=1e-5)
    assert_same(epsilon(model), found, 1e-2 if kind == "int8" else 1e-3)  # int8 layers round their input


# --- on the same model as others -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
@pytest.mark.parametrize("form", ["lora", "dora", "gralora"])
def test_beside_ggpo(form, noise):
    torch.manual_seed(0)
    model = FORMS[form]()
    inner = GGPOOptimizer(torch.optim.AdamW(trainable(model), lr=1e-2), model, sigma=0.1, noise=noise, seed=1)
    optimizer = LoRASAMOptimizer(inner, model, rho=0.3)
    x = batch(model)
    for _ in range(2):
        step(model, optimizer, x)
    with inner.unperturbed():
        alone = epsilon(model)
    both = epsilon(model)
    assert torch.stack([part.square().sum() for part in alone.values()]).sum().sqrt() == pytest.approx(0.3, rel=1e-7)
    assert_same(both, {name: alone[name] + noise_of(inner, name) for name in both}, 1e-9)
    state = optimizer.state_dict()
    assert set(state["flatlora"]) == {"LoRASAMOptimizer", "GGPOOptimizer"}
    optimizer.load_state_dict(state)
    assert difference(both, epsilon(model)) is None


def test_adapters_that_take_turns():
    """Of adapters with ranks of their own, each step's ε is that of the adapter it trained."""
    torch.manual_seed(0)
    model = peft(MLP(9, 11, 7), ["up", "down"], adapters=TWO)
    optimizer, x = lorasam(model, adapter=["first", "second"]), batch(model)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        parts = dense_pass(copy.deepcopy(model), x, epsilon(model))
        step(model, optimizer, x)
        assert_same(epsilon(model), normalised(parts, 0.3)[0])


# --- life, protocol and settings -------------------------------------------------------------------------------------


def test_protocol():
    torch.manual_seed(0)
    model = FORMS["lora"]()
    optimizer, x = lorasam(model, lr=0.1), batch(model)
    step(model, optimizer, x)
    present, before = optimizer.current_perturbation(), epsilon(model)
    with optimizer.unperturbed():
        assert not any(value.any() for value in epsilon(model).values())
    step(model, optimizer, batch(model, seed=1))
    assert difference(before, epsilon(model)) is not None
    with optimizer.perturbed_as(present):
        assert_same(epsilon(model), before, 1e-9)
    model.eval()
    assert set(optimizer.current_perturbation().values()) == {None}
    optimizer.remove()
    assert optimizer.perturbation_norm() == 0


def test_rho_may_be_set_between_steps():
    model = FORMS["lora"]()
    optimizer, x = lorasam(model), batch(model)
    step(model, optimizer, x)
    before = epsilon(model)
    optimizer.rho = 0.6
    assert_same(epsilon(model), {name: 2 * value for name, value in before.items()}, 1e-9)
    assert optimizer.perturbation_norm() == pytest.approx(0.6)
    assert float(optimizer.metrics()["perturbation_to_rho"]) == pytest.approx(1)
    optimizer.rho = 0
    assert not any(value.any() for value in epsilon(model).values())
    assert optimizer.perturbation_norm() == 0 == float(optimizer.metrics()["perturbation_to_rho"])
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.rho = -1
    assert optimizer.rho == 0


def test_rho_raised_from_zero_goes_by_the_last_gradient():
    model = one_layer()
    optimizer = lorasam(model)

    def epsilon_after(seed, rho):
        optimizer.rho = rho
        step(model, optimizer, batch(model, seed=seed))
        optimizer.rho = 0.3
        return epsilon(model)

    first = epsilon_after(0, 0.3)
    assert difference(first, epsilon_after(1, 0.0)) is not None
    torch.testing.assert_close(epsilon_after(0, 0.0), first)


def test_rho_zero_is_the_base_optimizer():
    model, twin = tiny_llama(), tiny_llama()
    train(model, LoRASAMOptimizer(adamw(model), model, rho=0), range(3))
    train(twin, adamw(twin), range(3))
    assert difference(adapters(model), adapters(twin)) is None


@pytest.mark.parametrize("form", ["lora", "gralora"])
def test_states_of_other_models_are_refused_and_change_nothing(form):
    model = FORMS[form]()
    optimizer, x = lorasam(model), batch(model)
    step(model, optimizer, x)
    before = copy.deepcopy(optimizer.state_dict())
    name = next(iter(before["flatlora"]["LoRASAMOptimizer"]["layers"]))

    def shorter(own, factor):
        own["layers"][name][factor] = own["layers"][name][factor][..., :-1]

    for match, change in [
        ("no dict by layer name", lambda own: own.update(layers=[1])),
        ("another model", lambda own: own["layers"].pop(name)),
        ("both be None", lambda own: own["layers"][name].update(A=None)),
        ("both be None", lambda own: shorter(own, "A")),
        ("both be None", lambda own: shorter(own, "B")),
        ("directions part is a list", lambda own: own["layers"][name].update(directions=[1])),
        ("direction part lacks A", lambda own: own["layers"][name].update(directions={"other": {"B": None}})),
    ]:
        state = copy.deepcopy(before)
        change(state["flatlora"]["LoRASAMOptimizer"])
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
        assert difference(before, optimizer.state_dict()) is None


def test_a_checkpoint_of_the_base_optimizer_starts_without_a_perturbation(caplog):
    model = FORMS["lora"]()
    optimizer, x = lorasam(model), batch(model)
    step(model, optimizer, x)
    optimizer.load_state_dict(torch.optim.SGD(trainable(model), lr=0.5).state_dict())
    assert "no LoRASAM part" in caplog.text and optimizer.perturbation_norm() == 0
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_parameters_that_come_later_are_perturbed_from_then_on():
    torch.manual_seed(0)
    model = FORMS["lora"]()
    inner, x = model.base_model.model, batch(model)
    up = [p for p in inner.up.parameters() if p.requires_grad]
    down = [p for p in inner.down.parameters() if p.requires_grad]
    optimizer = LoRASAMOptimizer(torch.optim.SGD(up, lr=0.0), model, rho=0.3)
    step(model, optimizer, x)
    assert [bool(value.any()) for value in epsilon(model).values()] == [True, False]
    model.zero_grad()
    optimizer.add_param_group({"params": down})
    parts = dense_pass(copy.deepcopy(model), x, epsilon(model))
    step(model, optimizer, x)
    assert_same(epsilon(model), normalised(parts, 0.3)[0])


def test_wrong_calls():
    model = FORMS["lora"]()
    base = torch.optim.SGD(trainable(model), lr=0.1)
    for bad in (-0.1, float("inf"), True, "a"):
        with pytest.raises(ValueError, match="rho must be"):
            LoRASAMOptimizer(base, model, rho=bad)
    with pytest.raises(ValueError, match="unknown adapter"):
        LoRASAMOptimizer(base, model, adapter="other")
    with pytest.raises(ValueError, match="none of them is an adapter"):
        LoRASAMOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), model)
    with pytest.raises(TypeError, match="optimizer must be"):
        LoRASAMOptimizer(torch.optim.SGD, model)
    first = LoRASAMOptimizer(base, model)
    with pytest.raises(ValueError, match="already perturbed"):
        LoRASAMOptimizer(base, model)
    step(model, first, batch(model))
    LoRASAMOptimizer(base, model)
    with pytest.raises(RuntimeError, match="built later"):
        first.step()


# --- what it is for -----------------------------------------------------------------------------------------------

SHARP, FLAT = torch.zeros(2, 2).double(), torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double()
SHARP_RADIUS = 2 / (8**0.5 - 1)  # where both parabolas meet on the far side of SHARP


def two_minima(W):
    """Two parabolas, with Hessians 8·I and I; W belongs to the lower one."""
    return torch.minimum(4 * (W - SHARP).square().sum(), (W - FLAT).square().sum() / 2)


def settled(seed, rho):
    """Where a run with ρ, and then without, ends from a random start around SHARP; rank 2 is any 2×2 update."""
    model = one_layer(2, 2, bias=False, r=2, lora_alpha=2)
    (module,) = adapted(model).values()
    start = SHARP + 0.55 * torch.randn(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eye = torch.eye(2).double()
    with torch.no_grad():
        for factor in (module.lora_A, module.lora_B):
            factor["default"].weight.copy_(eye)
        module.base_layer.weight.copy_(start - eye)
    optimizer = lorasam(model, lr=0.05, rho=rho)
    for at in range(220):
        if at == 100:
            optimizer.rho = 0.0
        two_minima(model(eye).t()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dense(module)[0].detach()


def test_of_two_minima_it_finds_the_flatter_where_descent_leaves_it_to_chance():
    def found(rho):
        ends = [settled(seed, rho) for seed in range(8)]
        assert all(two_minima(end) < 1e-6 for end in ends)
        return sum(bool((end - FLAT).norm() < 1e-2) for end in ends)

    assert 2 <= found(0.0) <= 6
    assert found(SHARP_RADIUS) == 8
