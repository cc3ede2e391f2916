"""noise_rise, weight_noise and worst_case_rise against closed forms; what they measure is left as it was."""

import pytest
import torch
import torch.nn.functional as F
from helpers import dense
from models import MLP, Net, ParameterLoRA, lora_modules, one_layer, peft, trainable

from flatlora import GGPOOptimizer, hessian_top_eigenvalue, landscape, noise_rise, weight_noise, worst_case_rise
from flatlora.reference import ggpo_std as expected_std


def quadratic(m=10, n=7):
    """A layer, and a batch whose targets it meets up to a constant residual."""
    model = one_layer(m, n)
    x = torch.randn(20, n, dtype=torch.float64)
    with torch.no_grad():
        target = F.linear(x, dense(model.base_model.model.fc)[0]) + dense(model.base_model.model.fc)[1] + 0.3
    return model, (x, target)


def loss_fn(model, batch):
    x, target = batch
    return 0.5 * (model(x) - target).square().sum()


@pytest.mark.parametrize("measure", [noise_rise, worst_case_rise, hessian_top_eigenvalue, landscape])
def test_model_and_loss_in_the_wrong_order_are_refused_by_name(measure):
    model, batch = quadratic()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        measure(loss_fn, model, [batch])


def test_rise_of_a_quadratic_loss_is_half_the_trace():
    model, batch = quadratic()
    std = expected_std(dense(model.base_model.model.fc)[0], 0.1)
    expected = 0.5 * float(std.square().sum() * batch[0].square().sum())
    found = noise_rise(model, loss_fn, [batch], sigma=0.1, draws=400)
    assert found.loss == pytest.approx(0.5 * 0.3**2 * 200)
    assert 0 < found.error < 0.1 * expected
    assert abs(found.rise - expected) < 4 * found.error
    # The residual's linear term has a variance of its own: Σ_i d_i²·‖xᵀr_i‖².
    linear = float((std.square() * (0.3 * batch[0].sum(0)).square().sum()).sum())
    assert found.error > 0.8 * (linear / 400) ** 0.5


def test_error_is_the_standard_error_of_the_mean_over_draws():
    model, batch = quadratic()
    rises = [noise_rise(model, loss_fn, [batch], draws=k).rise * k for k in range(1, 7)]
    single = torch.tensor([b - a for a, b in zip([0.0, *rises], rises, strict=False)])
    found = noise_rise(model, loss_fn, [batch], draws=6)
    assert found.rise == pytest.approx(float(single.mean()), rel=1e-4)
    assert found.error == pytest.approx(float(single.std()) / 6**0.5, rel=1e-3)
    assert torch.tensor(noise_rise(model, loss_fn, [batch], draws=1).error).isnan()


def test_equal_seeds_give_equal_rises_and_batches_count_equally():
    model, batch = quadratic()
    one = noise_rise(model, loss_fn, [batch], seed=4)
    assert one == noise_rise(model, loss_fn, iter([batch, batch]), seed=4)
    assert one != noise_rise(model, loss_fn, [batch], seed=5)


def test_nothing_rises_without_noise():
    model, batch = quadratic()
    assert noise_rise(model, loss_fn, [batch], sigma=0.0).rise == 0


def test_an_optimizer_on_the_model_neither_disturbs_nor_is_disturbed():
    model, batch = quadratic()
    expected = noise_rise(model, loss_fn, [batch])
    optimizer = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.5, seed=1)
    output = model(batch[0])
    found = noise_rise(model, loss_fn, [batch])
    assert (found.loss, found.rise, found.error) == pytest.approx((expected.loss, expected.rise, expected.error))
    assert torch.equal(model(batch[0]), output)
    optimizer.remove()
    assert "forward" not in model.base_model.model.fc.__dict__


def test_weight_noise_holds_until_its_step_is_changed():
    model = Net(ParameterLoRA(10, 7).double()).eval()
    x = torch.randn(3, 7, dtype=torch.float64)
    clean = model(x)
    with weight_noise(model, 0.1) as noise:
        first = model(x)
        assert torch.equal(model(x), first) and not torch.equal(first, clean)
        noise.step += 1
        assert not torch.equal(model(x), first)
    assert torch.equal(model(x), clean)


@pytest.mark.parametrize("options", [{"draws": 0}, {"draws": -1}, {"batches": []}, {"adapter": "other"}], ids=str)
def test_wrong_calls(options):
    model, batch = quadratic()
    with pytest.raises(ValueError):
        noise_rise(model, loss_fn, **{"batches": [batch], **options})
    with pytest.raises(ValueError, match="no adapted linear layer"):
        noise_rise(torch.nn.Linear(2, 2), loss_fn, [batch])
    assert "forward" not in model.base_model.model.fc.__dict__ and model.training


@pytest.mark.parametrize("measure", [worst_case_rise, hessian_top_eigenvalue, landscape])
@pytest.mark.parametrize("read", [float, torch.Tensor.detach])
def test_a_loss_without_a_gradient_is_refused(measure, read):
    model, batch = quadratic()
    with pytest.raises(TypeError, match="must return a tensor that requires a gradient"):
        measure(model, lambda model, batch: read(loss_fn(model, batch)), [batch])
    assert "forward" not in model.base_model.model.fc.__dict__ and model.training


def test_worst_case_rise_is_the_formed_ascent_step():
    model = peft(MLP(12, 16, 8, bias=True), ["up", "down"])
    x, y = torch.randn(10, 12, dtype=torch.float64), torch.randn(10, 8, dtype=torch.float64)
    rise = worst_case_rise(model, loss_fn, [(x, y)], rho=0.5)
    weights, biases = zip(*(dense(module) for module in lora_modules(model).values()), strict=True)
    weights = [weight.detach().requires_grad_() for weight in weights]

    def loss(weights):
        hidden = F.silu(F.linear(x, weights[0], biases[0]))
        return 0.5 * (F.linear(hidden, weights[1], biases[1]) - y).square().sum()

    grads = torch.autograd.grad(loss(weights), weights)
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    stepped = loss([w + 0.5 * grad / norm for w, grad in zip(weights, grads, strict=True)])
    assert rise == pytest.approx(float(stepped - loss(weights)), rel=1e-9)
    size = sum(float(weight.square().sum()) for weight in weights) ** 0.5
    # No random step of that length climbs as far.
    assert rise > noise_rise(model, loss_fn, [(x, y)], sigma=0.5 / size, draws=16).rise
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
