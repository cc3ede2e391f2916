"""The standard deviations of GGPO's noise, row by row: what the weight and what the gradient contribute."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    applied_weight,
    at_step,
    computing,
    dense,
    gradient_rows,
    lm_loss,
    noise_of,
    projection,
    rank_correlation,
    step,
    tokens,
)
from models import (
    MLP,
    TWO,
    Net,
    ParameterLoRA,
    fc,
    lora_modules,
    one_layer,
    peft,
    quantised_mlp,
    tiny_llama,
    trainable,
)
from test_ggpo import ggpo, only
from torch import nn

from flatlora import GGPOOptimizer
from flatlora.layers import stack
from flatlora.layers.base import FloatBase
from flatlora.reference import ggpo_std as expected_std
from flatlora.reference import projected


def assert_rows(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found.double(), expected.detach().double(), rtol=tolerance, atol=0)


def dense_gradients(model, optimizer, loss_fn):
    """∂L/∂W' per layer at the perturbed weights, by autograd on dense W' + ε put in the place of every layer."""
    weights, perturbed = {}, {}
    for name, module in lora_modules(model).items():
        weight, bias = dense(module)
        weights[name] = weight.detach().requires_grad_(True)
        perturbed[module] = weights[name] + noise_of(optimizer, name), bias
    with computing(perturbed):
        grads = torch.autograd.grad(loss_fn(model), list(weights.values()))
    return dict(zip(weights, grads, strict=True))


# --- moments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"noise": "low_rank", "noise_rank": 3}], ids=["gaussian", "low_rank"])
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
        grad = projection(module, gradients[name])
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


# --- the weight's part --------------------------------------------------------------------------------------------


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
    for x in batches:
        (model(x) - 1).square().mean().backward()
    optimizer.step()
    expected = projection(layer, grad)
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


@pytest.mark.parametrize("form", ["lora", "dora", "two adapters", "conv1d"])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_row_std_after_several_steps(form, base):
    model = one_layer(**GRADIENT_FORMS[form])
    optimizer = ggpo(model, 0.02, base, sigma=0.1, beta=0.5)
    name = next(iter(lora_modules(model)))
    x, target = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 10, dtype=torch.float64)
    for _ in range(4):
        grad = dense_gradients(model, optimizer, lambda model: (model(x) - target).square().mean())[name]
        grad = projection(fc(model), grad)
        step(model, optimizer, x, target)
        assert_rows(only(optimizer.row_std()), expected_std(dense(fc(model))[0], 0.1, 0.5, grad))


def test_layers_are_looked_at_in_turns_and_a_turns_deviations_are_exact():
    model = tiny_llama(torch.float64)
    optimizer = ggpo(model, 0.05, sigma=0.1, beta=0.5, update_every=3)
    modules, stds = lora_modules(model), optimizer.row_std()
    for count in range(1, 8):
        ids = tokens(count)
        grads = dense_gradients(model, optimizer, lambda model, ids=ids: lm_loss(model, ids))
        grads = {name: projection(modules[name], grad) for name, grad in grads.items()}
        lm_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        before, stds = stds, optimizer.row_std()
        for i, (name, module) in enumerate(modules.items()):
            if (count + i) % 3 == 0:
                assert_rows(stds[name], expected_std(dense(module)[0], 0.1, 0.5, grads[name]))
            assert torch.equal(stds[name], before[name]) == ((count + i) % 3 != 0)


def test_between_turns_only_other_strengths_have_deviations_computed_anew():
    """And a checkpoint holds those that are gone on with; one of version 0.1.0 has none."""
    models = [one_layer() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    optimizer, resumed, old = (ggpo(model, 0.1, sigma=0.2, beta=1.0, update_every=4) for model in models)
    x = torch.randn(5, 7, dtype=torch.float64)
    first = only(optimizer.row_std())
    for _ in range(2):
        step(models[0], optimizer, x)
    held = only(optimizer.row_std())
    present = expected_std(dense(fc(models[0]))[0], 0.2)
    assert torch.equal(held, first) and (held / present - 1).abs().max() > 1e-3
    for model, other in ((models[1], resumed), (models[2], old)):
        model.load_state_dict(models[0].state_dict())
        state = optimizer.state_dict()
        if other is old:
            for layer in state["flatlora"]["GGPOOptimizer"]["layers"].values():
                del layer["std"]
        other.load_state_dict(state)
    assert torch.equal(only(resumed.row_std()), held)
    assert_rows(only(old.row_std()), present)
    optimizer.beta = 0
    assert_rows(only(optimizer.row_std()), present)


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
    assert len(stds) == 21
    for name, module in lora_modules(model).items():
        grad = None if module is silent else projection(module, gradients[name])
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
        lm_loss(model, tokens(i)).backward()
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
    optimizer = GGPOOptimizer(torch.optim.AdamW(trainable(model), lr=1e-2), model, beta=1.0, update_every=1, seed=0)
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
