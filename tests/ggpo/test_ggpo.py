"""GGPOOptimizer against the specification: moments of the noise, its row scales, and what it must leave alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MLP,
    Net,
    ParameterLoRA,
    applied_weight,
    at_step,
    base_weight,
    dense,
    expected_std,
    gradient_rows,
    lm_loss,
    lora_modules,
    noise_of,
    one_layer,
    peft,
    projected,
    quantised,
    quantised_mlp,
    rank_correlation,
    tiny_gpt2,
    tiny_llama,
    tokens,
    trainable,
)
from peft import get_peft_model_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora import GGPOOptimizer, weight_noise
from flatlora.layers import stack
from flatlora.layers.base import FloatBase

KINDS = ["gaussian", "low_rank"]
TWO = {"first": {"r": 2, "lora_alpha": 5}, "second": {"r": 3}}


def ggpo(model, lr=0.0, base=torch.optim.SGD, **options):
    return GGPOOptimizer(base(trainable(model), lr=lr), model, **{"seed": 3, **options})


def fc(model):
    return model.base_model.model.fc if hasattr(model, "base_model") else model.fc


def only(stds):
    (std,) = stds.values()
    return std


def assert_rows(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found.double(), expected.detach().double(), rtol=tolerance, atol=0)


def step(model, optimizer, x, target=0.0):
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# --- moments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"noise": "low_rank", "noise_rank": 3}], ids=KINDS)
def test_moments_of_the_noise(options):
    """Mean 0, variance σ²/n (‖W'_i‖² + β‖G_i‖²) per row; nothing correlates, within a step or from one to the next."""
    draws, sigma, beta, n = 4000, 0.2, 30.0, 5
    model = peft(MLP(n, n, 4), ["up", "down"], r=2)
    optimizer = ggpo(model, sigma=sigma, beta=beta, **options)
    x = torch.randn(9, n, dtype=torch.float64)
    gradients = dense_gradients(model, optimizer, lambda model: model(x).square().mean())
    step(model, optimizer, x)
    stds = []
    for name, module in lora_modules(model).items():
        factors = module.lora_B["default"].weight, module.lora_A["default"].weight
        grad = projected(gradients[name], *factors)
        assert beta * grad.square().sum() > 0.05 * dense(module)[0].square().sum()  # the term is there to be seen
        stds.append(expected_std(dense(module)[0], sigma, beta, grad).detach())
    names = list(gradient_rows(optimizer))
    samples = []
    for t in range(draws):
        at_step(optimizer, t)
        noises = [noise_of(optimizer, name) / std[:, None] for name, std in zip(names, stds, strict=True)]
        samples.append(torch.cat([noise.flatten() for noise in noises]))
    z = torch.stack(samples)
    # One element's square has variance 2 + 6/k, a product of two has 1 + 2/k.
    k = options.get("noise_rank", 1e9)
    assert z.mean(0).abs().max() < 4.5 * draws**-0.5
    row_variance = z.square().view(draws, -1, n).mean(2)
    error = row_variance.std(0) * draws**-0.5
    assert ((row_variance.mean(0) - 1).abs() < 4.5 * error).all() and error.max() < 0.03
    width, limit = z.shape[1], 6 * ((1 + 2 / k) / draws) ** 0.5
    within = z.t() @ z / draws - torch.eye(width)
    assert within.fill_diagonal_(0).abs().max() < limit
    assert (z[1:].t() @ z[:-1] / (draws - 1)).abs().max() < limit
    assert width == 45  # both layers


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


# --- row_std: the weight's part -----------------------------------------------------------------------------------


FORMS = {
    "lora": one_layer,
    "rslora": lambda: one_layer(use_rslora=True),
    "dora": lambda: one_layer(use_dora=True),
    "conv1d": lambda: one_layer(conv1d=True),
    "dora conv1d": lambda: one_layer(use_dora=True, conv1d=True),
    "two adapters": lambda: one_layer(adapters=TWO),
    "float32": lambda: one_layer(96, 80, dtype=torch.float32),
    "bfloat16 base": lambda: peft(Net(nn.Linear(80, 96).bfloat16()), ["fc"], None),
    "hand-made": lambda: Net(ParameterLoRA(10, 7).double()),
    "hand-made transposed": lambda: Net(ParameterLoRA(10, 7, transposed=True).double()),
}


@pytest.mark.parametrize("form", FORMS)
def test_row_std_equals_the_dense_formula(form):
    model = FORMS[form]()
    optimizer = ggpo(model, sigma=0.07)
    assert_rows(only(optimizer.row_std()), expected_std(dense(fc(model))[0], 0.07))
    assert set(optimizer.row_std()) == {name for name, module in model.named_modules() if module is fc(model)}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_row_std_of_quantised_layers(kind):
    model = quantised_mlp(kind)
    optimizer = ggpo(model, sigma=0.07)
    for t in range(2):  # before and after the first forward
        for name, std in optimizer.row_std().items():
            assert_rows(std, expected_std(dense(model.get_submodule(name))[0], 0.07))
        model(torch.randn(2, 64))
        at_step(optimizer, t + 1)


MIXED = {
    "two dora": {"first": {"use_dora": True, "r": 2}, "second": {"use_dora": True}},
    "lora and dora": {"first": {"r": 2}, "second": {"use_dora": True}},
    "dora and lora": {"first": {"use_dora": True, "r": 2}, "second": {}},
}


@pytest.mark.parametrize("adapters", MIXED)
def test_row_std_of_mixed_adapters_is_that_of_the_weight_peft_applies(adapters):
    model = one_layer(adapters=MIXED[adapters])
    weight = applied_weight(fc(model), 7)
    assert_rows(only(ggpo(model).row_std()), expected_std(weight, 0.03))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_frozen_weight_that_is_written_to_is_looked_at_again(replaced):
    model = one_layer()
    optimizer = ggpo(model)
    model.train()(torch.randn(2, 7, dtype=torch.float64))  # which computes the standard deviations of this step
    with torch.no_grad():
        base = fc(model).base_layer
        if replaced:
            base.weight = torch.nn.Parameter(10 * base.weight, requires_grad=False)
        else:
            base.weight.mul_(10.0)
    assert_rows(only(optimizer.row_std()), expected_std(applied_weight(fc(model), 7), 0.03))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"adapters": TWO}], ids=["lora", "dora", "two"])
@pytest.mark.parametrize("merged_first", [False, True])
def test_merged_adapters_are_not_counted_twice(config, merged_first):
    model = one_layer(**config)
    expected = expected_std(applied_weight(fc(model), 7), 0.03)
    optimizer = ggpo(model)
    if not merged_first:
        assert_rows(only(optimizer.row_std()), expected)
    model.merge_adapter()
    assert_rows(only(optimizer.row_std()), expected)
    model.unmerge_adapter()
    assert_rows(only(optimizer.row_std()), expected)


def test_a_merged_layer_which_nothing_trains_is_unperturbed():
    model = one_layer()
    x = torch.randn(4, 7, dtype=torch.float64)
    weight, bias = dense(fc(model))
    optimizer = ggpo(model, sigma=0.5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), F.linear(x, weight) + bias, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), F.linear(x, weight + noise_of(optimizer)) + bias, rtol=1e-10, atol=1e-10)


def test_row_std_under_autocast_is_the_same():
    model = one_layer(96, 80, dtype=torch.float32)
    optimizer = ggpo(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 80))
    assert_rows(only(optimizer.row_std()), expected_std(dense(fc(model))[0], 0.03))


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_row_std_sees_parameters_that_others_changed(part):
    model = one_layer(use_dora=True)
    optimizer = ggpo(model)
    optimizer.row_std()
    with torch.no_grad():
        getattr(fc(model), part)["default"].weight.mul_(1.7)
    assert_rows(only(optimizer.row_std()), expected_std(dense(fc(model))[0], 0.03))


def test_sigma_and_beta_can_be_set_between_steps():
    model = one_layer()
    optimizer = ggpo(model)
    before = only(optimizer.row_std())
    optimizer.sigma = 0.06
    assert_rows(only(optimizer.row_std()), 2 * before)
    optimizer.sigma = 0
    x = torch.randn(4, 7, dtype=torch.float64)
    weight, bias = dense(fc(model))
    torch.testing.assert_close(model(x), F.linear(x, weight) + bias, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="beta must be a finite number >= 0, got -1"):
        optimizer.beta = -1
    assert optimizer.beta == 0.01


# --- the gradient's part ------------------------------------------------------------------------------------------


def dense_gradients(model, optimizer, loss_fn):
    """∂L/∂W' per layer at the perturbed weights, by autograd on dense W' + ε put in the place of every layer."""
    weights, undo = {}, []
    for name, module in lora_modules(model).items():
        weight, bias = dense(module)
        noise = noise_of(optimizer, name)
        weights[name] = weight.detach().requires_grad_(True)
        undo.append((module, module.__dict__["forward"]))
        module.forward = lambda x, w=weights[name], e=noise, b=bias: F.linear(x, w + e) + b
    loss = loss_fn(model)
    grads = torch.autograd.grad(loss, list(weights.values()))
    for module, forward in undo:
        module.forward = forward
    return dict(zip(weights, grads, strict=True))


def tangent_factors(module):
    """B and A of the space {Σ B_k·X + Y·A_k} in which a layer's update moves W', with DoRA's row factors."""
    bs, as_ = [], []
    for name in module.active_adapters:
        b = module.lora_B[name].weight.detach()
        if name in module.lora_magnitude_vector:
            raw = base_weight(module.get_base_layer()) + module.scaling[name] * b @ module.lora_A[name].weight
            b = (module.lora_magnitude_vector[name].weight / raw.norm(dim=1))[:, None] * b
        bs.append(b)
        as_.append(module.lora_A[name].weight)
    return torch.cat(bs, 1).detach(), torch.cat(as_).detach()


def duplicate(parameter, dim):
    """Makes a factor of rank 4 one of rank 2."""
    with torch.no_grad():
        parameter.narrow(dim, 2, 2).copy_(parameter.narrow(dim, 0, 2))


GRADIENT_FORMS = {
    "lora": {},
    "large scaling": {"lora_alpha": 100},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "conv1d": {"conv1d": True},
    "two adapters": {"adapters": TWO},
    "B = 0": {},
    "rank-deficient B": {},
    "rank-deficient A": {},
    "square": {"m": 4, "n": 4},
}


@pytest.mark.parametrize("form", GRADIENT_FORMS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradient_rows_are_those_of_the_projected_dense_gradient(form, micro_batches):
    model = one_layer(**GRADIENT_FORMS[form])
    layer, n = fc(model), 4 if form == "square" else 7
    if form == "B = 0":
        nn.init.zeros_(layer.lora_B["default"].weight)
    elif form == "rank-deficient B":
        duplicate(layer.lora_B["default"].weight, 1)
    elif form == "rank-deficient A":
        duplicate(layer.lora_A["default"].weight, 0)
    optimizer = ggpo(model, sigma=0.3, beta=1.0)
    batches = [torch.randn(6, n, dtype=torch.float64) for _ in range(micro_batches)]
    name = next(iter(lora_modules(model)))
    grad = sum(
        dense_gradients(model, optimizer, lambda model, x=x: (model(x) - 1).square().mean())[name] for x in batches
    )
    weight, _ = dense(layer)
    factors = tangent_factors(layer)
    for x in batches:
        (model(x) - 1).square().mean().backward()
    optimizer.step()
    expected = projected(grad, *factors)
    rows = gradient_rows(optimizer)[name]
    torch.testing.assert_close(rows.sqrt(), expected.norm(dim=1), rtol=1e-6, atol=1e-9 * float(expected.norm()))
    assert expected.norm() < 0.999 * grad.norm() or form in ("square", "two adapters")
    assert_rows(only(optimizer.row_std()), expected_std(weight, 0.3, 1.0, expected))


def test_first_step_has_no_gradient_term():
    model = one_layer()
    optimizer = ggpo(model, beta=1e6)
    expected = expected_std(dense(fc(model))[0], 0.03)
    assert_rows(only(optimizer.row_std()), expected)
    model(torch.randn(5, 7, dtype=torch.float64)).square().mean().backward()
    assert_rows(only(optimizer.row_std()), expected)
    optimizer.step()
    assert (only(optimizer.row_std()) > 2 * expected).all()


def test_a_checkpoint_with_the_relative_beta_of_version_0_1_is_taken_only_without_it():
    optimizer = ggpo(one_layer())
    state = optimizer.state_dict()
    form = state["flatlora"]["GGPOOptimizer"]["form"]
    form.append(True)
    with pytest.raises(ValueError, match="relative_beta=True, an option that is gone"):
        optimizer.load_state_dict(state)
    form[2] = False
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["flatlora"]["GGPOOptimizer"]["form"] == ["gaussian", 8]


def test_two_adapters_of_two_optimizers_do_not_draw_the_same():
    model = one_layer(adapters=TWO)
    stds, draws = [], []
    for adapter in TWO:
        optimizer = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.2, seed=3, adapter=adapter)
        draws.append(noise_of(optimizer))
        stds.append(only(optimizer.row_std()))
        optimizer.remove()
    assert_rows(stds[0], stds[1])
    assert not torch.allclose(draws[0], draws[1])


def test_a_layer_that_a_step_leaves_out_has_no_gradient_term():
    """Whether its gradient is None or zero."""
    for to_none in (True, False):
        model = peft(MLP(), ["up", "down"])
        optimizer = ggpo(model, sigma=0.2, beta=1.0)
        x = torch.randn(5, model.base_model.model.up.in_features, dtype=torch.float64)
        step(model, optimizer, x)
        optimizer.zero_grad(set_to_none=to_none)
        model.base_model.model.up(x).square().mean().backward()
        optimizer.step()
        rows = {name.rsplit(".", 1)[-1]: found for name, found in gradient_rows(optimizer).items()}
        assert rows["up"].sum() > 0 and rows["down"].sum() == 0


def test_a_frozen_a_leaves_the_projection_on_its_row_space():
    """LoRA-FA: ``G·A⁺A``."""
    model = one_layer()
    optimizer = ggpo(model, sigma=0.2, beta=1.0)
    layer, x = fc(model), torch.randn(6, 7, dtype=torch.float64)
    name = next(iter(lora_modules(model)))
    grad = dense_gradients(model, optimizer, lambda model: (model(x) - 1).square().mean())[name]
    A = layer.lora_A["default"].weight.requires_grad_(False)
    step(model, optimizer, x, 1.0)
    expected = (grad @ torch.linalg.pinv(A) @ A).square().sum(1)
    torch.testing.assert_close(gradient_rows(optimizer)[name], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["lora", "dora", "two adapters", "conv1d"])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_row_std_after_several_steps(form, base):
    model = one_layer(**GRADIENT_FORMS[form])
    optimizer = ggpo(model, 0.02, base, sigma=0.1, beta=0.5)
    name = next(iter(lora_modules(model)))
    x, target = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 10, dtype=torch.float64)
    for _ in range(4):
        grad = dense_gradients(model, optimizer, lambda model: (model(x) - target).square().mean())[name]
        grad = projected(grad, *tangent_factors(fc(model)))
        step(model, optimizer, x, target)
        assert_rows(only(optimizer.row_std()), expected_std(dense(fc(model))[0], 0.1, 0.5, grad))


@pytest.mark.parametrize("together", [1, 1 << 19])
def test_layers_of_many_forms_each_have_their_own_rows(together, monkeypatch):
    """Ranks, scalings and shapes differ from layer to layer, and one layer's gradient may be missing."""
    monkeypatch.setattr(stack, "_CPU_MOST", together)
    patterns = {"rank_pattern": {"q_proj": 2, "gate_proj": 3}, "alpha_pattern": {"v_proj": 3}}
    model = tiny_llama(torch.float64, layers=3, **patterns)
    optimizer = ggpo(model, sigma=0.1, beta=5.0)
    silent = model.base_model.model.model.layers[1].mlp.down_proj
    gradients = dense_gradients(model, optimizer, lambda model: lm_loss(model, tokens()))
    lm_loss(model, tokens()).backward()
    silent.lora_A["default"].weight.grad = None
    optimizer.step()
    stds = optimizer.row_std()
    assert len(stds) == 12
    for name, module in lora_modules(model).items():
        grad = None if module is silent else projected(gradients[name], *tangent_factors(module))
        assert_rows(stds[name], expected_std(dense(module)[0], 0.1, 5.0, grad))


def test_layers_are_read_in_their_own_forward_where_their_weights_come_for_it():
    """As in block swapping: a weight is there while its layer runs, and at the step."""
    model = tiny_llama(torch.float64, layers=2)
    stored = {module: module.get_base_layer().weight.data for module in lora_modules(model).values()}

    def bring(module, *_):
        module.get_base_layer().weight.data = stored[module]

    def take(module, *_):
        module.get_base_layer().weight.data = torch.empty(0, 0, dtype=torch.float64)

    optimizer = ggpo(model, sigma=0.1, beta=5.0)
    expected = model(input_ids=tokens()).logits
    at_step(optimizer, 1)
    for module in stored:
        take(module)
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
    assert not torch.equal(model(input_ids=tokens()).logits, expected)
    at_step(optimizer, 0)
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected)


def test_layers_that_are_not_perturbed_are_not_read(monkeypatch):
    model = tiny_llama(layers=2)
    optimizer = ggpo(model)
    asked = []
    original = FloatBase.apply_rows
    monkeypatch.setattr(FloatBase, "apply_rows", lambda self, x, *rest: asked.append(1) or original(self, x, *rest))
    model.base_model.model.model.layers[1].eval()
    for _ in range(3):
        model(input_ids=tokens())
    assert len(asked) == len(gradient_rows(optimizer)) // 2


def test_each_layers_state_is_a_tensor_of_its_own():
    model = tiny_llama(layers=2)
    optimizer = ggpo(model)
    lm_loss(model, tokens()).backward()
    optimizer.step()
    state = optimizer.state_dict()["flatlora"]["GGPOOptimizer"]["layers"]
    assert all(one["grad_sq"].untyped_storage().nbytes() == 8 * one["shape"][0] for one in state.values())


def test_a_layer_changed_within_a_step_is_computed_anew():
    model = tiny_llama(torch.float64)
    optimizer = ggpo(model, sigma=0.1)
    before = optimizer.row_std()
    changed, module = list(lora_modules(model).items())[2]
    with torch.no_grad():
        module.lora_B["default"].weight.mul_(3)
    after = optimizer.row_std()
    assert_rows(after[changed], expected_std(dense(module)[0], 0.1))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [changed]


def test_float32_gradients_near_a_singular_b_give_finite_rows():
    """After one step of Adam from B = 0, B is a sign pattern: nearly rank-deficient, and small."""
    model = tiny_llama()
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B["default"].weight.zero_()
    optimizer = ggpo(model, 1e-4, torch.optim.AdamW, beta=1.0)
    gradients = {}
    for i in range(3):
        with torch.enable_grad():
            for module in lora_modules(model).values():
                module.get_base_layer().weight.requires_grad_(True)
        lm_loss(model, tokens(seed=i)).backward()
        for name, module in lora_modules(model).items():
            weight = module.get_base_layer().weight
            gradients[name] = weight.grad.norm()
            weight.grad = None
            weight.requires_grad_(False)
        optimizer.step()
        optimizer.zero_grad()
        for name, rows in gradient_rows(optimizer).items():
            assert rows.isfinite().all() and (rows >= 0).all()
            # A projection is never longer than what is projected, up to float32 rounding.
            assert rows.sum().sqrt() <= gradients[name] * 1.01


def test_projection_ranks_rows_better_than_the_usual_stand_in():
    """Prints Spearman's rank correlation of either estimate's row norms with the true ones, over a short training."""
    model = tiny_llama(layers=2)
    optimizer = GGPOOptimizer(torch.optim.AdamW(trainable(model), lr=1e-2), model, beta=1.0, seed=0)
    transition = torch.randint(0, 64, (64,))  # a language in which each token says the next, nearly always

    def batch():
        ids = [torch.randint(0, 64, (8,))]
        for _ in range(15):
            flip = torch.rand(8) < 0.1
            ids.append(torch.where(flip, torch.randint(0, 64, (8,)), transition[ids[-1]]))
        return torch.stack(ids, 1)

    for _ in range(40):
        lm_loss(model, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    modules = lora_modules(model)
    for module in modules.values():
        module.get_base_layer().weight.requires_grad_(True)
    lm_loss(model, batch()).backward()
    true, usual, dense_ours = {}, {}, {}
    for name, module in modules.items():
        lora_a, lora_b, s = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
        true[name] = module.get_base_layer().weight.grad.double()
        usual[name] = s * (lora_b @ lora_a.grad + lora_b.grad @ lora_a).detach().double()
        dense_ours[name] = projected(true[name], lora_b.detach().double(), lora_a.detach().double())
        module.get_base_layer().weight.requires_grad_(False)
    optimizer.step()
    figures = []
    for name, grad in true.items():
        ours = gradient_rows(optimizer)[name].sqrt()
        torch.testing.assert_close(ours, dense_ours[name].norm(dim=1), rtol=1e-2, atol=1e-3 * float(ours.max()))
        assert ours.norm() <= grad.norm() * (1 + 1e-4)
        assert (grad - dense_ours[name]).norm() <= (grad - usual[name]).norm()
        norms = grad.norm(dim=1)
        captured, wrong = float(ours.norm() / grad.norm()), float(usual[name].norm() / grad.norm())
        figures.append((rank_correlation(ours, norms), rank_correlation(usual[name].norm(dim=1), norms)))
        short = name.split("layers.")[1]
        print(f"{short:24} spearman {figures[-1][0]:.3f} / {figures[-1][1]:.3f}, norm {captured:.2f} / {wrong:.2f}")
    mean_ours, mean_usual = torch.tensor(figures).mean(0).tolist()
    print(f"mean: projected {mean_ours:.3f}, s(B·g_A + g_B·A) {mean_usual:.3f}")
    assert mean_ours > 0.5


# --- low-rank noise -----------------------------------------------------------------------------------------------


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


class LargestNew(TorchDispatchMode):
    """Records the largest tensor made, views of older ones aside."""

    def __init__(self, model):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self.largest = (0, "")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, (t.numel(), str(func)))
        return out


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
        with LargestNew(model) as mode:  # the second time ‖W0_i‖² is known
            optimizer.step()
            optimizer.row_std()
        optimizer.zero_grad()
    assert 0 < mode.largest[0] < m * n // 2, mode.largest


# --- law 1: the base is read-only ---------------------------------------------------------------------------------


def frozen_bits(model):
    bits = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            bits[name] = p.detach().clone()
            state = getattr(p, "quant_state", None)
            if state is not None:
                bits[name + ".absmax"] = state.absmax.clone()
    for name, module in model.named_modules():
        if getattr(getattr(module, "state", None), "SCB", None) is not None:
            bits[name + ".SCB"] = module.state.SCB.clone()
    return bits


def assert_bits(model, bits):
    now = frozen_bits(model)
    assert all(torch.equal(now[name], value) for name, value in bits.items())


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4", "int8"])
def test_base_is_bit_identical_after_fifty_steps_and_a_crash(form, noise):
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    quantise = form in ("nf4", "int8")
    model = quantised_mlp(form) if quantise else peft(MLP(64, 96, 64), ["up", "down"], dtype)
    x = torch.randn(4, 64, dtype=dtype)
    model(x)  # bitsandbytes moves its scales
    bits = frozen_bits(model)
    assert len(bits) >= 2
    optimizer = ggpo(model, 1e-2, torch.optim.AdamW, noise=noise, sigma=0.3)
    losses = [step(model, optimizer, x) for _ in range(50)]
    assert losses[-1] < losses[0]
    assert_bits(model, bits)

    def crash(*args):
        raise RuntimeError("crash")

    handle = model.base_model.model.down.register_forward_pre_hook(crash)
    with pytest.raises(RuntimeError, match="crash"):
        model(x)
    assert_bits(model, bits)
    handle.remove()
    step(model, optimizer, x)
    assert_bits(model, bits)


# --- law 2: eval, saving and merging never see it -----------------------------------------------------------------


def clean_and_noisy(**options):
    model = one_layer(**options)
    x = torch.randn(4, 7, dtype=torch.float64)
    weight, bias = dense(fc(model))
    return model, ggpo(model, sigma=0.5), x, (F.linear(x, weight) + bias).detach()


def same(a, b):
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_eval_mode_is_unperturbed():
    model, _, x, clean = clean_and_noisy()
    assert not same(model(x), clean)
    model.eval()
    assert same(model(x), clean)
    model.train()
    assert not same(model(x), clean)


def test_the_models_mode_alone_counts():
    model, optimizer, x, clean = clean_and_noisy()
    noisy = model(x)
    optimizer.eval()  # as Accelerate does around an evaluation
    model.eval()
    assert same(model(x), clean)
    model.train()
    assert torch.equal(model(x), noisy)
    model.eval()
    optimizer.train()
    assert same(model(x), clean)


def test_train_and_eval_reach_a_base_optimizer_that_has_them():
    class Switching(torch.optim.SGD):
        calls = ()

        def train(self):
            self.calls += ("train",)

        def eval(self):
            self.calls += ("eval",)

    model = one_layer()
    optimizer = ggpo(model, base=Switching)
    optimizer.eval()
    optimizer.train()
    assert optimizer.base_optimizer.calls == ("eval", "train")


def test_disabled_and_foreign_adapters_are_unperturbed():
    model, _, x, _ = clean_and_noisy()
    with model.disable_adapter():
        assert same(model(x), fc(model).base_layer(x))
    model = one_layer(adapters=TWO)
    model.base_model.set_adapter("first")
    optimizer = ggpo(model, sigma=0.5, adapter="first")
    assert not same(model(x), F.linear(x, dense(fc(model))[0]) + fc(model).base_layer.bias)
    model.base_model.set_adapter("second")
    assert same(model(x), F.linear(x, dense(fc(model))[0]) + fc(model).base_layer.bias)
    model.base_model.set_adapter(["first", "second"])
    weight, bias = dense(fc(model))
    assert same(model(x), F.linear(x, weight + noise_of(optimizer)) + bias)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_saved_and_merged_weights_are_unperturbed(config, tmp_path):
    from safetensors.torch import load_file

    model, optimizer, x, clean = clean_and_noisy(**config)
    expected = {name: p.detach().clone() for name, p in get_peft_model_state_dict(model).items()}
    model(x).sum().backward()
    optimizer.step()  # lr = 0
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    merged = copy.deepcopy(model).merge_and_unload()
    assert same(merged(x), clean)
    assert same(model.merge_and_unload()(x), clean)


# --- law 3: the global random numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("noise", KINDS)
def test_the_global_random_stream_is_what_it_would_have_been(noise):
    def states(perturbed):
        torch.manual_seed(5)
        model = tiny_llama(lora_dropout=0.3)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
        if perturbed:
            optimizer = GGPOOptimizer(optimizer, model, noise=noise)
        found = [torch.get_rng_state()]
        for i in range(3):
            lm_loss(model, tokens(seed=i)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if perturbed:
                optimizer.row_std()
                optimizer.state_dict()
            found.append(torch.get_rng_state())
        return found

    plain, ours = states(False), states(True)
    assert not torch.equal(plain[0], plain[1])
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


# --- law 4: one ε per optimizer step ------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", KINDS)
def test_one_noise_for_all_micro_batches_of_a_step(noise):
    model = one_layer()
    optimizer = ggpo(model, sigma=0.5, noise=noise)
    x = torch.randn(4, 7, dtype=torch.float64)
    outputs = []
    for _ in range(3):
        outputs.append(model(x))
        outputs[-1].sum().backward()
        model.eval()
        model(x)
        model.train()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    optimizer.zero_grad()
    assert torch.equal(model(x), outputs[0])
    model(x).sum().backward()
    optimizer.step()
    assert not same(model(x), outputs[0])


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("build", "dropout"), [(tiny_llama, 0.0), (tiny_llama, 0.2), (tiny_gpt2, 0.0)])
def test_checkpointed_gradients_equal_plain_ones(build, dropout, reentrant, noise):
    def gradients(checkpointing):
        torch.manual_seed(6)
        model = build(torch.float64, lora_dropout=dropout)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = ggpo(model, 1e-2, sigma=0.3, noise=noise)
        found = []
        for i in range(2):
            torch.manual_seed(i)
            for micro in range(2):
                lm_loss(model, tokens(seed=2 * i + micro)).backward()
            found += [p.grad.clone() for p in trainable(model)]
            optimizer.step()
            optimizer.zero_grad()
        return found

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# --- gradients that are not finite, and steps that are skipped ----------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_non_finite_gradients_leave_the_norms_as_they_were(value, first):
    model = peft(MLP(7, 8, 6), ["up", "down"])
    optimizer = ggpo(model, beta=1.0)
    x = torch.randn(5, 7, dtype=torch.float64)
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
    step(model, optimizer, torch.randn(5, 7, dtype=torch.float64))
    before = only(optimizer.row_std())
    optimizer.step()
    assert torch.equal(only(optimizer.row_std()), before)


def test_a_step_that_grad_scaler_skips_changes_nothing():
    model = one_layer(dtype=torch.float32)
    optimizer = ggpo(model, 0.1, beta=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x = torch.randn(5, 7)

    def scaled_step(spoil):
        scaler.scale(model(x).square().mean()).backward()
        if spoil:
            fc(model).lora_A["default"].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scaled_step(False)
    before, output, bits = only(optimizer.row_std()), model(x), [p.clone() for p in trainable(model)]
    scaled_step(True)
    assert torch.equal(only(optimizer.row_std()), before) and torch.equal(model(x), output)
    assert all(torch.equal(a, b) for a, b in zip(bits, trainable(model), strict=True))
    scaled_step(False)
    assert not torch.equal(only(optimizer.row_std()), before)


def test_grad_scaler_hands_over_unscaled_gradients():
    def rows(scale):
        torch.manual_seed(1)
        model = one_layer(dtype=torch.float32)
        optimizer = ggpo(model, beta=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        scaler.scale(model(torch.randn(5, 7)).square().mean()).backward()
        scaler.step(optimizer)
        return only(optimizer.row_std())

    torch.testing.assert_close(rows(1024.0), rows(1.0), rtol=1e-5, atol=0)


# --- wrong calls --------------------------------------------------------------------------------------------------


BAD_OPTIONS = [
    ({"sigma": -0.1}, ["sigma", "-0.1"]),
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


def test_a_second_wrapper_is_refused_until_the_first_is_removed():
    model, first, x, _ = clean_and_noisy()
    output = model(x)
    with pytest.raises(ValueError, match=r"fc.*already perturbed.*remove\(\)"):
        ggpo(model)
    assert torch.equal(model(x), output)
    first.remove()
    ggpo(model)


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
def test_a_state_dict_of_another_model_changes_nothing(other, words):
    model, optimizer, x, _ = clean_and_noisy()
    step(model, optimizer, x)
    foreign_model = other()
    foreign = ggpo(foreign_model, 0.1, sigma=0.01)
    step(foreign_model, foreign, x)
    output, state = model(x), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError) as raised:
        optimizer.load_state_dict(foreign.state_dict())
    for word in words:
        assert word in str(raised.value)
    assert torch.equal(model(x), output)
    assert str(optimizer.state_dict()) == str(state)


# --- state --------------------------------------------------------------------------------------------------------


def test_a_restored_optimizer_draws_the_same_noise():
    model, optimizer, x, _ = clean_and_noisy()
    for _ in range(3):
        step(model, optimizer, x)
    state = copy.deepcopy(optimizer.state_dict())
    output = model(x)
    optimizer.remove()
    again = ggpo(model, seed=99, sigma=0.01)
    assert not torch.equal(model(x), output)
    again.load_state_dict(state)
    assert torch.equal(model(x), output)


def test_metrics_are_the_expected_noise_and_the_gradients_share_of_it():
    model = one_layer()
    optimizer = ggpo(model, sigma=0.5, beta=2.0)
    assert optimizer.metrics() == {}
    x = torch.randn(6, 7, dtype=torch.float64)
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
    x = torch.randn(6, 7, dtype=torch.float64)
    for target in (0.0, 100.0):
        (model(x) - target).square().mean().backward()
        before = optimizer.metrics()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.sigma = 0.3
        after = optimizer.metrics()
        assert {name: float(value) for name, value in before.items()} == {name: float(v) for name, v in after.items()}
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
