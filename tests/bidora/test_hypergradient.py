"""Hypergradients and whole iterations against exact derivatives and another library."""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from problems import SGD, TrueDora, batch, bilevel, generic, net_batch, peft_net, relative, same, state_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatlora import (
    BilevelOptimizer,
    BiLoRAOptimizer,
    GGPOOptimizer,
    OptimizerWrapper,
    attach_auxiliary,
    direction_parameters,
    lora_layers,
    magnitude_parameters,
)
from flatlora.bidora.parameters import reset_directions


@pytest.mark.parametrize("xi", [1.0, 0.3, "lr"])
@pytest.mark.parametrize("virtual_step", [True, False])
def test_matches_exact_unrolled_autograd(xi, virtual_step):
    torch.manual_seed(0)
    model, train, val = TrueDora(), batch(), batch()
    rate = 0.1 if xi == "lr" else xi
    params = list(model.parameters())
    v, mu = params[:4], params[4:]
    inner = torch.autograd.grad(model(**train).loss, v, create_graph=True)
    there = [p - rate * g if virtual_step else p for p, g in zip(v, inner, strict=True)]
    fixed = [p.detach().requires_grad_() for p in there]
    found = torch.autograd.grad(model(**val, parameters=[*fixed, *mu]).loss, [*mu, *fixed])
    direct, direction = found[:2], found[2:]
    if virtual_step:
        exact = torch.autograd.grad(model(**val, parameters=[*there, *mu]).loss, mu)
    else:
        mixed = torch.autograd.grad(sum((g * d).sum() for g, d in zip(inner, direction, strict=True)), mu)
        exact = [d - rate * m for d, m in zip(direct, mixed, strict=True)]
    assert relative(direct, exact) > 0.01  # what is left without the second-order term

    def error(difference: str, epsilon: float) -> float:
        optimizer = generic(model, xi=xi, difference=difference, epsilon=epsilon)
        return relative(optimizer.hypergradient(train, val, virtual_step=virtual_step), exact)

    assert error("central", 0.01) < 0.01
    assert error("forward", 0.01) < 0.1
    assert error("central", 0.1) / error("central", 0.01) == pytest.approx(100, rel=0.2)
    assert error("forward", 1e-2) / error("forward", 1e-3) == pytest.approx(10, rel=0.2)


def test_matches_exact_derivative_on_peft_layers():
    model, train, val = peft_net(), net_batch(), net_batch()
    v, mu = direction_parameters(model), magnitude_parameters(model)

    def true_loss(data: dict[str, Tensor]) -> Tensor:
        """The same network with the norm in the graph."""
        x = data["x"]
        for layer in lora_layers(model):
            adapter = layer.all_adapters()[0]
            w = layer.base.float_weight() + adapter.scaling * adapter.B @ adapter.A
            bias = layer.base.module.bias
            x = F.linear(x, w * (adapter.magnitude / w.norm(dim=1)).unsqueeze(1), bias)
            x = torch.tanh(x) if layer.name.endswith("first") else x
        return F.mse_loss(x, data["labels"])

    assert torch.allclose(true_loss(val), model(**val).loss)
    before = [p.detach().clone() for p in v]
    grads = torch.autograd.grad(model(**train).loss, v)
    with torch.no_grad():
        for p, g in zip(v, grads, strict=True):
            p -= 0.5 * g
    found = torch.autograd.grad(model(**val).loss, [*mu, *v])
    direct, direction = found[: len(mu)], found[len(mu) :]
    with torch.no_grad():
        for p, old in zip(v, before, strict=True):
            p.copy_(old)
    inner = torch.autograd.grad(true_loss(train), v, create_graph=True)
    mixed = torch.autograd.grad(sum((g * d).sum() for g, d in zip(inner, direction, strict=True)), mu)
    exact = [d - 0.5 * m for d, m in zip(direct, mixed, strict=True)]
    assert relative(list(direct), exact) > 0.1  # what is left without the second-order term

    def error(difference: str, epsilon: float) -> float:
        optimizer = bilevel(model, xi=0.5, difference=difference, epsilon=epsilon, orthogonality=0.0)
        return relative(optimizer.hypergradient(train, val), exact)

    assert error("central", 0.01) < 0.01
    assert error("forward", 0.01) < 0.1
    assert error("central", 0.1) / error("central", 0.01) == pytest.approx(100, rel=0.3)
    assert error("forward", 1e-2) / error("forward", 1e-3) == pytest.approx(10, rel=0.3)


@pytest.mark.filterwarnings("ignore")
def test_matches_betty():
    betty = pytest.importorskip("betty.engine")
    from betty.configs import Config, EngineConfig
    from betty.problems import ImplicitProblem

    torch.manual_seed(0)
    model, train, val = TrueDora(), batch(), batch()
    ours = generic(model, xi=1.0, epsilon=1e-3).hypergradient(train, val, virtual_step=False)

    class Level(nn.Module):
        def __init__(self, params: list[Tensor]):
            super().__init__()
            self.ps = nn.ParameterList([p.detach().clone() for p in params])

    class Upper(ImplicitProblem):
        def training_step(self, data):
            return model(**val, parameters=[*self.lower.module.ps, *self.module.ps]).loss

    class Lower(ImplicitProblem):
        def training_step(self, data):
            return model(**train, parameters=[*self.module.ps, *self.upper.module.ps]).loss

    parts = {"upper": list(model.parameters())[4:], "lower": list(model.parameters())[:4]}
    levels, loader = {}, DataLoader(TensorDataset(torch.zeros(1)))
    for name, kind in (("upper", Upper), ("lower", Lower)):
        module = Level(parts[name])
        # A lower learning rate of zero keeps V where it is, an upper one of one shows the gradient.
        optimizer = SGD(module.parameters(), lr=1.0 if name == "upper" else 0.0)
        config = Config(type="darts", darts_alpha=1e-3, unroll_steps=1, retain_graph=True)
        levels[name] = kind(name=name, config=config, module=module, optimizer=optimizer, train_data_loader=loader)
    dependencies = {"u2l": {levels["upper"]: [levels["lower"]]}, "l2u": {levels["lower"]: [levels["upper"]]}}
    logging.disable(logging.INFO)
    try:
        engine = betty.Engine([*levels.values()], EngineConfig(train_iters=1), dependencies)
        engine.run()
    finally:
        logging.disable(logging.NOTSET)
    theirs = [old - new for old, new in zip(parts["upper"], levels["upper"].module.ps, strict=True)]
    assert relative(ours, theirs) < 1e-6
    assert relative(generic(model, xi=0.0).hypergradient(train, val, virtual_step=False), theirs) > 0.05


class Ridge(nn.Module):
    """½‖X·w − y‖² + ½·Σ λ_j·w_j² with an orthonormal X: w_j* = b_j / (1 + λ_j), and λ_j* = b_j / t_j − 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.decay = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor, train: bool) -> SimpleNamespace:
        fit = 0.5 * (x @ self.w - y).square().sum()
        return SimpleNamespace(loss=fit + 0.5 * (self.decay * self.w.square()).sum() if train else fit)


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_ridge_converges_to_the_closed_form(difference):
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q
    b, t = torch.tensor([2.0, -3.0, 1.5]).double(), torch.tensor([1.0, -2.5, 0.5]).double()
    train, val = {"x": x, "y": x @ b, "train": True}, {"x": x, "y": x @ t, "train": False}

    def solve(xi: float, steps: int) -> Tensor:
        model = Ridge()
        lower, upper = SGD([model.w], lr=0.3), SGD([model.decay], lr=0.3)
        optimizer = BilevelOptimizer(
            lower, upper, model, [train], [val], xi=xi, unroll_steps=3, difference=difference, epsilon=1e-4
        )
        for _ in range(steps):
            optimizer.step()
        return model.decay.detach()

    assert torch.allclose(solve(1.0, 300), b / t - 1, atol=1e-3)
    assert not torch.allclose(solve(0.0, 50), b / t - 1, atol=0.5)  # alternating first-order updates


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("unroll_steps", [1, 3])
def test_step_takes_the_lower_steps_and_then_the_hypergradient(difference, unroll_steps):
    """Against the iteration written out with autograd, no finite difference and no optimizer."""
    torch.manual_seed(0)
    model, train, val = TrueDora(), [batch() for _ in range(3)], batch()
    theirs = copy.deepcopy(model)
    theirs.w = model.w
    v, mu = [SGD(ps, lr=0.1) for ps in ([*model.a, *model.b], [*model.mu])]
    optimizer = BilevelOptimizer(
        v, mu, model, train, [val], unroll_steps=unroll_steps, difference=difference, epsilon=1e-4, xi=0.7
    )
    result = optimizer.step()
    params = list(theirs.parameters())
    low, up = params[:4], params[4:]
    for data in train[:unroll_steps]:
        loss = theirs(**data).loss
        inner = torch.autograd.grad(loss, low, create_graph=True)
        at_v = inner
        with torch.no_grad():
            after = [p - 0.1 * g for p, g in zip(low, inner, strict=True)]
        val_loss = theirs(**val, parameters=[*(p.requires_grad_() for p in after), *up]).loss
        direct, direction = (torch.autograd.grad(val_loss, ps, retain_graph=True) for ps in (up, after))
        mixed = torch.autograd.grad(sum((g * d).sum() for g, d in zip(at_v, direction, strict=True)), up)
        with torch.no_grad():
            for p, new in zip(low, after, strict=True):
                p.copy_(new)
    hyper = [d - 0.7 * m for d, m in zip(direct, mixed, strict=True)]
    assert relative([p.grad for p in model.mu], hyper) < 1e-3
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(low, list(model.parameters())[:4], strict=True))
    assert result.train_loss == pytest.approx(loss.item()) and result.val_loss == pytest.approx(val_loss.item())
    assert result.upper_grad_norm == pytest.approx(float(torch.cat(hyper).norm()), rel=1e-3)
    assert result.lower_grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in inner]).norm()))


def test_hypergradient_changes_nothing():
    model = peft_net(dropout=0.2)
    model.base_model.model.norm = nn.BatchNorm1d(6).double()
    own = model.base_model.model.forward
    model.base_model.model.forward = lambda x, labels=None: own(model.base_model.model.norm(x), labels)
    train, val = net_batch(), net_batch()
    optimizer = bilevel(model, [train], [val])
    optimizer.step()
    before, grads = state_of(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    stream, checkpoint = torch.get_rng_state(), copy.deepcopy(optimizer.state_dict())
    first = optimizer.hypergradient(net_batch(), net_batch())
    assert len(first) == 2 and all(g.shape == p.shape for g, p in zip(first, magnitude_parameters(model), strict=True))
    torch.set_rng_state(stream)  # the two calls of net_batch drew
    optimizer.hypergradient(train, val)
    assert torch.equal(stream, torch.get_rng_state())
    assert same(before, state_of(model))
    assert all(
        torch.equal(g, p.grad)
        for g, p in zip(grads, (p for p in model.parameters() if p.grad is not None), strict=True)
    )
    assert str(checkpoint) == str(optimizer.state_dict())


@pytest.mark.parametrize("kind", ["plain", "ggpo", "ggpo low_rank", "bilora"])
def test_subtracted_passes_see_the_same_randomness(kind):
    """If they did not, the error would be of the order of 1/e, and the two differences would be nowhere near."""

    def magnitude_grads(difference: str, epsilon: float) -> list[Tensor]:
        model = peft_net(dropout=0.3)
        lower = SGD(direction_parameters(model), lr=0.1)
        if kind.startswith("ggpo"):
            noise = "low_rank" if kind.endswith("low_rank") else "gaussian"
            lower = GGPOOptimizer(lower, model, sigma=0.2, seed=1, noise=noise)
        elif kind == "bilora":
            auxiliary = attach_auxiliary(model, r=2, seed=1)
            groups = [{"params": direction_parameters(model)}, {"params": auxiliary, "ascent": True}]
            lower = BiLoRAOptimizer(SGD(groups, lr=0.5), model, rho=0.3)
        torch.manual_seed(3)
        optimizer = bilevel(model, lower=lower, difference=difference, epsilon=epsilon)
        torch.manual_seed(4)
        for _ in range(3):
            optimizer.step()
        return [p.grad for p in magnitude_parameters(model)]

    exact = magnitude_grads("central", 1e-3)
    assert relative(magnitude_grads("central", 1e-4), exact) < 1e-4
    assert relative(magnitude_grads("forward", 1e-4), exact) < 1e-2


class Shift(OptimizerWrapper):
    """A perturbing method that the package does not know: adds `delta` to the model's input, another one every step."""

    def __init__(self, optimizer, model: nn.Module, delta: Tensor):
        super().__init__(optimizer)
        self.delta = delta
        self.handle = model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, model, args, kwargs):
        return args, {**kwargs, "x": kwargs["x"] + self.delta}

    @torch.no_grad()
    def after_step(self) -> None:
        self.delta.copy_(torch.randn(self.delta.shape, generator=torch.Generator().manual_seed(8)))

    def perturbation_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p is self.delta]

    def current_perturbation(self) -> Tensor:
        return self.delta.detach().clone()

    @contextmanager
    def perturbed_as(self, perturbation: Tensor):
        held = self.delta.detach().clone()
        try:
            with torch.no_grad():
                self.delta.copy_(perturbation)
            yield
        finally:
            with torch.no_grad():
                self.delta.copy_(held)

    def unperturbed(self):
        return self.perturbed_as(torch.zeros_like(self.delta))


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("kind", ["one", "two", "parameter"])
def test_any_perturbing_optimizer_is_held_and_lifted(kind, difference):
    """The subtracted passes see what the lower pass saw, the validation pass nothing, whatever the method."""
    torch.manual_seed(0)
    model, train, val = TrueDora(), batch(), batch()
    low, up = list(model.parameters())[:4], list(model.parameters())[4:]
    shifts = [torch.randn(5, dtype=torch.float64) for _ in range(2 if kind == "two" else 1)]
    if kind == "parameter":
        model.delta = nn.Parameter(shifts[0].clone())
        lower = Shift(SGD([*low, model.delta], lr=0.1), model, model.delta)
    else:
        lower = SGD(low, lr=0.1)
        for shift in shifts:
            lower = Shift(lower, model, shift.clone())
    optimizer = BilevelOptimizer(lower, SGD(up, lr=0.1), model, [train], [val], difference=difference, epsilon=1e-4)
    theirs = TrueDora()
    theirs.w = model.w
    low, up = ([p.detach().clone().requires_grad_() for p in ps] for ps in (low, up))
    shifted = {**train, "x": train["x"] + sum(shifts)}

    def exact(rate: float) -> list[Tensor]:
        """The hypergradient for ξ = 1 at V' = V − rate·∇_V L_tr."""
        inner = torch.autograd.grad(theirs(**shifted, parameters=[*low, *up]).loss, low, create_graph=True)
        after = [(p - rate * g).detach().requires_grad_() for p, g in zip(low, inner, strict=True)]
        found = torch.autograd.grad(theirs(**val, parameters=[*after, *up]).loss, [*up, *after])
        mixed = torch.autograd.grad(sum((g * d).sum() for g, d in zip(inner, found[2:], strict=True)), up)
        return [d - m for d, m in zip(found[:2], mixed, strict=True)]

    assert relative(optimizer.hypergradient(train, val), exact(1.0)) < 1e-3
    assert relative(optimizer.hypergradient(train, val, virtual_step=False), exact(0.0)) < 1e-3
    optimizer.step()
    assert relative([p.grad for p in model.mu], exact(0.1)) < 1e-3
    assert not torch.equal(optimizer.lower.delta, shifts[-1])


@pytest.mark.parametrize("by", ["another", "lower", "parameter"])
def test_phase_two_lifts_what_is_not_its_optimizers(by):
    model, data = peft_net(), net_batch()
    model.delta = nn.Parameter(torch.randn(6, dtype=torch.float64))
    lower = Shift(SGD([*direction_parameters(model), model.delta], lr=0.0), model, model.delta)
    optimizer = bilevel(model, lower=lower)
    held = [*direction_parameters(model), *([model.delta] if by == "parameter" else [])]
    second = lower if by == "lower" else SGD(held, lr=0.0)
    delta = model.delta.detach().clone()
    loss = optimizer.retrain([data], 1, optimizer=second)
    lower.handle.remove()
    seen = data["x"] if by == "another" else data["x"] + delta
    assert loss[0] == pytest.approx(model(**{**data, "x": seen}).loss.item())


def test_metrics_are_the_norms_of_the_two_terms():
    torch.manual_seed(0)
    model, train, val = TrueDora(), batch(), batch()
    first = generic(model, xi=0.0).hypergradient(train, val, virtual_step=False)
    whole = generic(model).hypergradient(train, val, virtual_step=False)
    optimizer = BilevelOptimizer(SGD([*model.a, *model.b], lr=0.0), SGD(model.mu, lr=0.0), model, [train], [val])
    assert optimizer.metrics() == {}
    step = optimizer.step()
    found = optimizer.metrics()
    assert all(isinstance(value, Tensor) for value in found.values())
    second = [a - b for a, b in zip(first, whole, strict=True)]
    for name, term in (("hypergradient", whole), ("first_order", first), ("second_order", second)):
        assert found[f"{name}_norm"].item() == pytest.approx(torch.cat(term).norm().item(), rel=1e-6)
    assert found["lower_grad_norm"].item() == step.lower_grad_norm
    assert found["hypergradient_norm"].item() == step.upper_grad_norm


@pytest.mark.parametrize("orthogonality", [0.0, 1e-5])
def test_metrics_correlate_how_far_magnitudes_and_directions_have_moved(orthogonality):
    """DoRA's Eq. 3-4 by whole weights; a third layer, as two always correlate fully."""
    model = peft_net()
    model.base_model.model.third = copy.deepcopy(model.base_model.model.first)
    modules = [getattr(model.base_model.model, name) for name in ("first", "second", "third")]
    reset_directions(model, None, seed=0)
    for i, module in enumerate(modules):
        module.lora_magnitude_vector["default"].weight.data = module.base_layer.weight.norm(dim=1) * (1 + 0.1 * i)
        module.lora_B["default"].weight.data = 1e-5 * torch.randn_like(module.lora_B["default"].weight)
    optimizer = bilevel(model, lr=1e-3, orthogonality=orthogonality)
    assert optimizer.metrics() == {}
    optimizer.step()
    points = []
    for module in modules:
        base, change = module.base_layer.weight, module.get_delta_weight("default")
        orthogonal = change - base * ((change * base).sum(1) / base.square().sum(1))[:, None]
        sine = orthogonal.norm(dim=1) / (base + change).norm(dim=1)
        magnitude = (module.lora_magnitude_vector["default"].weight - base.norm(dim=1)).abs().mean()
        points.append([magnitude.item(), (1 - torch.asin(sine).cos()).mean().item()])
    expected = numpy.corrcoef(numpy.array(points).T)[0, 1]
    found = optimizer.metrics()["update_correlation"]
    assert isinstance(found, Tensor) and found.item() == pytest.approx(expected, rel=1e-6)
    assert 0.01 < abs(expected) < 0.99
    saved = optimizer.state_dict()
    resumed = bilevel(model, lr=1e-3, orthogonality=orthogonality)
    resumed.load_state_dict(saved)
    assert {name: value.item() for name, value in resumed.metrics().items()} == {"update_correlation": found.item()}


def test_streams_go_on_as_after_the_lower_passes_alone():
    model = peft_net(dropout=0.3)
    data = DataLoader(TensorDataset(torch.arange(8)), batch_size=2, shuffle=True)

    def loss_fn(model, rows):
        return model(x=torch.ones(2, 6).double(), labels=rows[0][:, None].double().expand(2, 4)).loss

    optimizer = bilevel(model, data, list(data), loss_fn=loss_fn)
    torch.manual_seed(5)
    for _ in range(6):
        optimizer.step()
    found = torch.get_rng_state()
    torch.manual_seed(5)
    for _ in range(6):
        loss_fn(model, [torch.ones(2)])
    assert torch.equal(found, torch.get_rng_state())


def test_validation_is_unperturbed():
    model, losses = peft_net(), []
    lower = GGPOOptimizer(SGD(direction_parameters(model), lr=0.0), model, sigma=0.5, seed=0)
    train, val = net_batch(), net_batch()
    expected = peft_net()(**val).loss.item()
    optimizer = bilevel(model, [train], [val], lower=lower)
    losses = [optimizer.step() for _ in range(2)]
    assert losses[0].val_loss == pytest.approx(expected)
    assert losses[0].train_loss != losses[1].train_loss  # at V, which stays, under another ε
