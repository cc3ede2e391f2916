"""Hypergradients against exact derivatives and another library, and everything around them."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from flatlora import (
    BilevelOptimizer,
    BiLoRAOptimizer,
    GGPOOptimizer,
    attach_auxiliary,
    direction_parameters,
    lora_layers,
    magnitude_parameters,
    split_dataset,
)
from flatlora.bidora.orthogonality import add_orthogonality_gradient, orthogonality
from flatlora.layers.bnb import Bnb4bitBase

SGD = torch.optim.SGD


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    found, expected = (torch.cat([t.detach().flatten() for t in ts]) for ts in (found, expected))
    return float((found - expected).norm() / expected.norm())


def output(prediction: Tensor, labels: Tensor | None) -> SimpleNamespace:
    return SimpleNamespace(loss=None if labels is None else F.mse_loss(prediction, labels))


class TrueDora(nn.Module):
    """Two DoRA layers whose norm is part of the graph, (m, n) = (7, 5) and (3, 7)."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(7, 5), (3, 7)]
        self.w = [torch.randn(m, n, dtype=torch.float64) for m, n in shapes]
        self.a = nn.ParameterList([torch.randn(2, n, dtype=torch.float64) for _, n in shapes])
        self.b = nn.ParameterList([torch.randn(m, 2, dtype=torch.float64) for m, _ in shapes])
        self.mu = nn.ParameterList([w.norm(dim=1) for w in self.w])

    def forward(self, x: Tensor, labels: Tensor | None = None, parameters: list[Tensor] | None = None):
        a, b, mu = self.a, self.b, self.mu
        if parameters is not None:
            a, b, mu = parameters[:2], parameters[2:4], parameters[4:]
        for i, w in enumerate(self.w):
            v = w + b[i] @ a[i]
            x = torch.tanh(F.linear(x, v * (mu[i] / v.norm(dim=1)).unsqueeze(1)))
        return output(x, labels)


def batch(size: int = 16, n: int = 5, m: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"x": torch.randn(size, n, dtype=dtype), "labels": torch.randn(size, m, dtype=dtype)}


def generic(model: nn.Module, **kwargs) -> BilevelOptimizer:
    lower = SGD([*model.a, *model.b], lr=kwargs.pop("lr", 0.1))
    return BilevelOptimizer(lower, SGD(model.mu.parameters(), lr=0.1), model, [batch()], [batch()], **kwargs)


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


# --- PEFT's DoRA --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, n: int = 6, hidden: int = 8, m: int = 4):
        super().__init__()
        self.first, self.second = nn.Linear(n, hidden), nn.Linear(hidden, m)

    def forward(self, x: Tensor, labels: Tensor | None = None):
        return output(self.second(torch.tanh(self.first(x))), labels)


def peft_net(dropout: float = 0.0, dtype: torch.dtype = torch.float64, dora: bool = True, **shape: int) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=dropout,
        target_modules=["first", "second"],
        use_dora=dora,
        init_lora_weights=False,
    )
    return get_peft_model(Net(**shape).to(dtype), config).to(dtype).train()


def net_batch(size: int = 16, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return batch(size, 6, 4, dtype)


def bilevel(model: nn.Module, train=None, val=None, lower=None, lr: float = 0.1, **kwargs) -> BilevelOptimizer:
    lower = SGD(direction_parameters(model), lr=lr) if lower is None else lower
    train, val = [net_batch()] if train is None else train, [net_batch()] if val is None else val
    return BilevelOptimizer(lower, SGD(magnitude_parameters(model), lr=lr), model, train, val, **kwargs)


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

    def solve(xi: float) -> Tensor:
        model = Ridge()
        lower, upper = SGD([model.w], lr=0.3), SGD([model.decay], lr=0.3)
        optimizer = BilevelOptimizer(
            lower, upper, model, [train], [val], xi=xi, unroll_steps=3, difference=difference, epsilon=1e-4
        )
        for _ in range(400):
            optimizer.step()
        return model.decay.detach()

    assert torch.allclose(solve(1.0), b / t - 1, atol=1e-3)
    assert not torch.allclose(solve(0.0), b / t - 1, atol=0.1)  # alternating first-order updates


# --- one iteration ------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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
    optimizer = bilevel(model)
    optimizer.step()
    before, grads = state_of(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    stream, checkpoint = torch.get_rng_state(), copy.deepcopy(optimizer.state_dict())
    first = optimizer.hypergradient(net_batch(), net_batch())
    assert len(first) == 2 and all(g.shape == p.shape for g, p in zip(first, magnitude_parameters(model), strict=True))
    torch.set_rng_state(stream)  # the two calls of net_batch drew
    optimizer.hypergradient(*optimizer._train._loader, *optimizer._val._loader)
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


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_failing_pass_leaves_parameters_as_they_were():
    calls = []

    def loss_fn(model, data):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyError("labels")
        return model(**data).loss

    for fails_at in (1, 2, 3, 4):  # noqa: B007 - loss_fn reads it
        calls.clear()
        model = peft_net()
        before = state_of(model)
        optimizer = bilevel(model, loss_fn=loss_fn)
        with pytest.raises(KeyError):
            optimizer.step()
        assert same(before, state_of(model))
        assert all(p.requires_grad for p in magnitude_parameters(model) + direction_parameters(model))
        calls.clear()
        with pytest.raises(KeyError):
            optimizer.hypergradient(net_batch(), net_batch())
        assert same(before, state_of(model))


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


def levels(model: nn.Module):
    return SGD(direction_parameters(model), lr=0.1), SGD(magnitude_parameters(model), lr=0.1)


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
        (lambda a: a.update(xi=-1.0), ValueError, "xi must"),
        (lambda a: a.update(xi="learning rate"), ValueError, "xi must"),
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


# --- phase two ----------------------------------------------------------------------------------------------------


def test_phase_two():
    model = peft_net()
    whole = [{**net_batch(1), "i": i} for i in range(10)]
    train, val = split_dataset(whole, 0.2, seed=1)
    seen = []

    def loss_fn(model, data):
        seen.append(int(data["i"]))
        return model(x=data["x"].flatten(0, -2), labels=data["labels"].flatten(0, -2)).loss

    optimizer = bilevel(model, DataLoader(train, shuffle=True), DataLoader(val, shuffle=True), loss_fn=loss_fn)
    for _ in range(3):
        optimizer.step()
    magnitudes = [p.detach().clone() for p in magnitude_parameters(model)]
    directions = [p.detach().clone() for p in direction_parameters(model)]
    stream = torch.get_rng_state()
    second = torch.optim.AdamW(direction_parameters(model), lr=0.01, weight_decay=0.1)
    optimizer.retrain(DataLoader(whole, shuffle=True), 0, optimizer=second)
    assert torch.equal(stream, torch.get_rng_state())
    for adapter in (layer.all_adapters()[0] for layer in lora_layers(model)):
        assert not adapter.B.any() and adapter.A.std() > 0.1
    assert not any(torch.equal(p, old) for p, old in zip(direction_parameters(model), directions, strict=True))
    seen.clear()
    losses = optimizer.retrain(DataLoader(whole, shuffle=True), 10, optimizer=second)
    assert len(losses) == 10 and sorted(seen) == list(range(10))
    assert all(torch.equal(p, old) for p, old in zip(magnitude_parameters(model), magnitudes, strict=True))
    assert all(layer.all_adapters()[0].B.any() for layer in lora_layers(model))
    with pytest.raises(RuntimeError, match="second phase"):
        optimizer.step()
    before = state_of(model)
    with pytest.raises(ValueError, match="magnitudes"):
        optimizer.retrain(whole, 1, optimizer=SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer must be"):
        optimizer.retrain(whole, 1, optimizer=None)
    with pytest.raises(ValueError, match="no batch"):
        optimizer.retrain([], 1, optimizer=second)
    assert same(before, state_of(model))


# --- checkpoints and what others see ------------------------------------------------------------------------------


def run(steps: int, resume_at: int | None, tmp_path, own_generator: bool) -> tuple[dict, list]:
    """`steps` iterations, then as many of phase two; a new process is played at `resume_at`."""
    data = [net_batch(1, torch.float32) for _ in range(10)]

    def build():
        model = peft_net(0.2, torch.float32)
        torch.manual_seed(7)
        lower = GGPOOptimizer(torch.optim.AdamW(direction_parameters(model), lr=0.01), model, seed=0)
        upper = torch.optim.AdamW(magnitude_parameters(model), lr=0.01)
        generator = torch.Generator().manual_seed(3) if own_generator else None
        train, val = (DataLoader(part, 2, shuffle=True, generator=generator) for part in split_dataset(data, 0.4))
        optimizer = BilevelOptimizer(lower, upper, model, train, val, loss_fn=loss_fn, unroll_steps=2)
        return model, optimizer, torch.optim.AdamW(direction_parameters(model), lr=0.01)

    def loss_fn(model, data):
        return model(x=data["x"].squeeze(1), labels=data["labels"].squeeze(1)).loss

    model, optimizer, second = build()
    torch.manual_seed(9)
    results = []
    for i in range(2 * steps):
        if i == resume_at:
            stream = torch.get_rng_state()
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
            model, optimizer, second = build()
            weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            torch.set_rng_state(stream)
        if i < steps:
            results.append(optimizer.step())
        else:
            optimizer.lower.remove()
            loader = DataLoader(data, 3, shuffle=True)
            results.append(optimizer.retrain(loader, 1, optimizer=second))
    return state_of(model), results


@pytest.mark.parametrize("own_generator", [False, True])
def test_resume_is_bit_identical(tmp_path, own_generator):
    torch.manual_seed(0)
    stream = torch.get_rng_state()
    expected = run(5, None, tmp_path, own_generator)
    for resume_at in (1, 3, 7):
        torch.set_rng_state(stream)
        found = run(5, resume_at, tmp_path, own_generator)
        assert found[1] == expected[1]
        assert same(found[0], expected[0])


def test_state_dict_of_another_optimizer_is_refused():
    model = peft_net()
    optimizer = bilevel(model)
    with pytest.raises(ValueError, match="not written by BilevelOptimizer"):
        optimizer.load_state_dict(optimizer.lower.state_dict())
    others = SGD(direction_parameters(model)[1:], lr=0.1)
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_state_dict(bilevel(model, lower=others).state_dict())


def test_is_an_optimizer_to_others():
    from accelerate import Accelerator

    model = peft_net()
    optimizer = bilevel(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    groups = optimizer.param_groups
    assert groups[0] is optimizer.lower.param_groups[0] and groups[1] is optimizer.upper.param_groups[0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: 0.5**i, lambda i: 0.1**i])
    prepared = Accelerator(cpu=True).prepare(optimizer)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    prepared.step()
    scheduler.step()
    assert called == [1]
    assert [group["lr"] for group in optimizer.lower.param_groups + optimizer.upper.param_groups] == [0.05, 0.1 * 0.1]
    assert optimizer.last_step.val_loss > 0
    prepared.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(NotImplementedError, match=r"optimizer\.lower\.add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.state == {}  # SGD without momentum
    assert "Parameter Group 1" in repr(optimizer)


def test_epochs_are_reshuffled_and_every_batch_comes_once():
    seen = []
    model = peft_net()

    def loss_fn(model, rows):
        seen.append(int(rows[0]))
        return model(**good).loss

    good = net_batch()
    data = DataLoader(TensorDataset(torch.arange(8)), shuffle=True)
    optimizer = bilevel(model, data, [[-1]], loss_fn=loss_fn, xi=0.0)
    for _ in range(16):
        optimizer.step()
    order = [i for i in seen if i >= 0]
    assert sorted(order[:8]) == sorted(order[8:]) == list(range(8)) and order[:8] != order[8:]


# --- a loop of another --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loop_that_feeds_the_lower_level(difference, micro_batches):
    """The same updates as when the optimizer pulls its training batches, with dropout, accumulation and clipping."""
    data, val = [net_batch() for _ in range(4)], [net_batch()]

    def train(fed: bool) -> dict[str, Tensor]:
        model = peft_net(dropout=0.0 if micro_batches > 1 else 0.2)
        torch.manual_seed(1)
        optimizer = BilevelOptimizer(
            *levels(model), model, None if fed else data, val, difference=difference, epsilon=1e-3, unroll_steps=2
        )
        directions = direction_parameters(model)
        optimizer.lower.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(directions, 0.05) and None)
        torch.manual_seed(2)
        for step in range(4 if fed else 2):
            if not fed:
                optimizer.step()
                continue
            for i in range(micro_batches):
                part = {key: value.chunk(micro_batches)[i] for key, value in data[step].items()}
                (model(**part).loss / micro_batches).backward()
            assert all(p.grad is None for p in magnitude_parameters(model))
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
        return state_of(model)

    found, expected = train(True), train(False)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)


def test_a_loop_that_gave_nothing():
    model = peft_net()
    optimizer = BilevelOptimizer(*levels(model), model, None, [net_batch()])
    with pytest.raises(RuntimeError, match="no training batch"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure"):
        bilevel(model).step(lambda: None)
    before = state_of(model)
    optimizer.step(lambda: model(**net_batch()).loss.backward())
    assert not same(before, state_of(model))
    optimizer.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.slow
def test_trainer_evaluates_saves_and_resumes(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(0, 50, (8,)), "labels": i % 2} for i in range(24)]
    train, val = split_dataset(data, 0.25)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}

    def trainer(folder: str) -> Trainer:
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **shape))
        config = LoraConfig(r=2, target_modules="all-linear", use_dora=True, modules_to_save=["classifier"])
        model = get_peft_model(model, config)
        head = [p for name, p in model.named_parameters() if "modules_to_save" in name]
        lower = torch.optim.AdamW([*direction_parameters(model), *head], lr=1e-3)
        upper = torch.optim.AdamW(magnitude_parameters(model), lr=1e-3)
        optimizer = BilevelOptimizer(lower, upper, model, None, DataLoader(val, 3, shuffle=True))
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=6, save_steps=3, eval_strategy="steps", eval_steps=3,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=train, eval_dataset=val, optimizers=(optimizer, scheduler))

    whole = trainer("whole")
    start = state_of(whole.model)
    whole.train()
    assert any("eval_loss" in entry for entry in whole.state.log_history)
    changed = {name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert any("magnitude" in name for name in changed) and all(
        "lora" in name or "modules_to_save" in name for name in changed
    )
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(state_of(whole.model), state_of(resumed.model))


def test_nf4_with_8_bit_optimizers():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = Net(64, 128, 4)
    for name in ("first", "second"):
        old = getattr(net, name)
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4", compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        setattr(net, name, new.to("cpu"))
    config = LoraConfig(r=64, target_modules=["first", "second"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(net, config).train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    data = [batch(8, 64, 4, torch.float32) for _ in range(2)]
    reads, dense = [], Bnb4bitBase.dense
    lower = bnb.optim.AdamW8bit(direction_parameters(model), lr=1e-3)
    upper = bnb.optim.AdamW8bit(magnitude_parameters(model), lr=1e-3)
    optimizer = BilevelOptimizer(lower, upper, model, data[:1], data[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bnb4bitBase, "dense", lambda base, dtype: reads.append(base) or dense(base, dtype))
        for _ in range(3):
            optimizer.step()
    assert len(reads) == 3 * 2  # once per step and layer
    assert lower.state[direction_parameters(model)[0]]["state1"].dtype == torch.uint8
    assert upper.state[magnitude_parameters(model)[0]]["state1"].dtype == torch.float32
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


# --- the orthogonality term ---------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            tuple(t.shape) for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)
        }
        return out


@pytest.mark.parametrize(("n", "hidden", "m"), [(6, 8, 4), (9, 9, 12), (17, 5, 16)])
def test_orthogonality_term_and_gradient(n, hidden, m):
    model = peft_net(n=n, hidden=hidden, m=m)
    layers = lora_layers(model)
    terms = []
    for layer in layers:
        adapter = layer.all_adapters()[0]
        w = layer.base.float_weight().detach() + adapter.scaling * adapter.B @ adapter.A
        d = w / w.norm(dim=0)
        terms.append((d.t() @ d - torch.eye(w.shape[1])).norm())
    value = torch.stack(terms).mean()
    expected = torch.autograd.grad(value, direction_parameters(model))
    for p in direction_parameters(model):
        p.grad = torch.ones_like(p)
    with Shapes() as shapes:
        add_orthogonality_gradient(layers, 0.5)
    found = [(p.grad - 1) / 0.5 for p in direction_parameters(model)]
    assert relative(found, list(expected)) < 1e-9
    assert orthogonality(layers).item() == pytest.approx(value.item())
    assert not any((cols, cols) in shapes.seen for rows, cols in (layer.shape for layer in layers) if rows < cols)


def test_orthogonality_belongs_to_the_lower_loss():
    def directions(gamma: float) -> list[Tensor]:
        model = peft_net()
        torch.manual_seed(1)
        optimizer = bilevel(model, orthogonality=gamma, lr=1.0)
        before = [p.detach().clone() for p in direction_parameters(model)]
        optimizer.step()
        return [old - p.detach() for p, old in zip(direction_parameters(model), before, strict=True)]

    model = peft_net()
    for p in direction_parameters(model):
        p.grad = torch.zeros_like(p)
    add_orthogonality_gradient(lora_layers(model), 0.3)
    added = [a - b for a, b in zip(directions(0.3), directions(0.0), strict=True)]
    assert relative(added, [p.grad for p in direction_parameters(model)]) < 1e-9


def test_split_dataset():
    data = list(range(50))
    stream = torch.get_rng_state()
    train, val = split_dataset(data)
    assert torch.equal(stream, torch.get_rng_state())
    assert len(val) == 10 and sorted([*train, *val]) == data
    assert list(split_dataset(data)[1]) == list(val) != list(split_dataset(data, seed=1)[1])
    assert [len(part) for part in split_dataset([1, 2], 0.01)] == [1, 1]
    for fraction in (0, 1, "half"):
        with pytest.raises(ValueError, match="val_fraction"):
            split_dataset(data, fraction)
    with pytest.raises(ValueError, match="two or more"):
        split_dataset([1])
