"""How far ε raises the loss, as the products tell it: against autograd on dense ε."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import sgd
from methods import METHODS, PERTURBING, Method, adapted, batch, every_method, gralora, lorasam
from models import lora_mlp, trained
from torch import Tensor, nn

import flatlora
from flatlora.kernels.draw import draw_gaussian, draw_low_rank
from flatlora.layers.adapter import Adapter
from flatlora.perturbation.rise import LossRise

MEASURED = [
    *PERTURBING[:4],
    Method("GraLoRA under LoRASAM", gralora, lorasam),
    Method("DoRA under LoRASAM", METHODS[4].adapt, lorasam),
    Method("DoRA under GGPO", METHODS[4].adapt, METHODS[0].build),
]


def dense(optimizer: Any) -> dict[str, Tensor]:
    """ε (m, n) of each layer at present."""
    if isinstance(optimizer, flatlora.BiLoRAOptimizer):
        return {name: s * (B @ A).detach() for name, (A, B, s) in optimizer._auxiliaries().items()}
    found = {}
    for name, one in optimizer.current_perturbation().items():
        m, n = optimizer._source.layers[name].shape
        if one is None:
            found[name] = torch.zeros(m, n, dtype=torch.float64)
        elif isinstance(one, Adapter):
            found[name] = one.scaling * (one.B @ one.A if one.A.dim() == 2 else whole(one.B @ one.A))
        elif one.kind == "gaussian":
            found[name] = draw_gaussian(one, n, None, torch.float64)
        else:
            U, V = draw_low_rank(one, n, torch.float64)
            found[name] = U @ V
    return found


def whole(blocks: Tensor) -> Tensor:
    """A grid of blocks (g, g, m/g, n/g) as the matrix (m, n)."""
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def derivative(model: nn.Module, optimizer: Any, batches: list[Any], only: str | None = None) -> float:
    """``d/dλ Σ L(W' + λ·ε)`` at λ = 1 by autograd, of the layer `only` if one is named, ε dense beside each layer.

    On a copy, which nothing perturbs: hooks on a compiled model would have it compiled again.
    """
    noise, copied = dense(optimizer), copy.deepcopy(model)
    dials = {name: torch.ones((), dtype=torch.float64, requires_grad=True) for name in noise}
    for layer in flatlora.lora_layers(copied):
        layer.module.register_forward_hook(
            lambda _, args, out, name=layer.name: out + dials[name] * (args[0] @ noise[name].t())
        )
    loss = sum(copied(**one).loss for one in batches)
    found = torch.autograd.grad(loss, list(dials.values()))
    return float(sum(g for name, g in zip(dials, found, strict=True) if only in (None, name)))


def started(method: Method, **kwargs: Any) -> tuple[nn.Module, Any]:
    model = adapted(method, **kwargs).double()
    return model, method.start(model, sgd)


# Compiled: noise of an operator, factors, grids of blocks, DoRA's rows.
IN_GRAPHS = [MEASURED[i] for i in (0, 2, 4, 6)]
RUNS = [(method, False) for method in MEASURED] + [(method, True) for method in IN_GRAPHS]


@pytest.mark.parametrize(
    ("method", "compiled"), RUNS, ids=lambda value: getattr(value, "name", "compiled" if value else "eager")
)
def test_it_is_the_derivative_of_the_loss_by_the_perturbations_size(method: Method, compiled: bool) -> None:
    model, optimizer = started(method)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    layers = list(optimizer._source.layers)
    gaussian = "GGPO" in method.name and "low_rank" not in method.name
    for i in range(5 if gaussian else 3):
        micro = [batch(2 * i), batch(2 * i + 1)]
        only = optimizer._source.measured() if gaussian else None
        expected = derivative(model, optimizer, micro, only)
        for one in micro:
            run(**one).loss.backward()
        nn.utils.clip_grad_norm_(trained(model), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        expected *= 0.5 * len(layers) if gaussian else 0.5 if "GGPO" in method.name else 1.0
        if compiled and only in layers[:3]:
            continue  # the first block's queries, keys and values, whose input needs no gradient: backward stops before
        assert optimizer._source.rise.value.item() == pytest.approx(expected, rel=1e-5, abs=1e-12), i
        if i:  # LoRASAM's first step has no ε, Bi-LoRA's auxiliary is zero in it
            assert abs(expected) > 1e-7
            assert "loss_rise" in optimizer.metrics()


@every_method(among=MEASURED[:4])
def test_a_grad_scaler_leaves_it_in_units_of_the_loss(method: Method) -> None:
    found = []
    for scale in (1.0, 1024.0):
        model, optimizer = started(method)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for i in range(2):
            scaler.scale(model(**batch(i)).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(optimizer._source.rise.value.item())
    assert found[1] == pytest.approx(found[0], rel=1e-9) and found[0] != 0


@every_method(among=MEASURED[:4])
def test_gradients_that_are_dropped_do_not_count_and_an_infinite_loss_is_left_out(method: Method) -> None:
    found = []
    for wasted in (False, True):
        model, optimizer = started(method)
        for i in range(3):
            if wasted:  # as where a scaler skips a step
                (100 * model(**batch(50 + i)).loss).backward()
                optimizer.zero_grad()
            model(**batch(i)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.stack([optimizer._source.rise.value, *optimizer._source.rise.mean()]))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    (model(**batch(9)).loss * float("inf")).backward()
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(torch.stack(optimizer._source.rise.mean()), found[1][1:])


def test_the_running_mean_and_its_error_are_those_of_the_steps() -> None:
    rise, generator = LossRise(), torch.Generator().manual_seed(0)
    values = 0.3 + torch.randn(400, dtype=torch.float64, generator=generator)
    for value in values:
        rise.record("layer", value.reshape(1, 1))
        rise.read()
        rise.advance()
    w = 0.98 ** torch.arange(399, -1, -1, dtype=torch.float64)
    mean = (w * values).sum() / w.sum()
    share = (w / w.sum()).square().sum()
    error = ((w * (values - mean).square()).sum() / w.sum() / (1 - share) * share).sqrt()
    torch.testing.assert_close(torch.stack(rise.mean()), torch.stack([mean, error]))
    assert 0.05 < error < 0.2


@pytest.mark.parametrize(("unit", "told"), [(1e-4, "next to nothing"), (1.0, None), (1e3, "training may suffer")])
def test_it_is_said_once_that_a_perturbation_does_nothing_or_much(unit, told, caplog) -> None:
    model = lora_mlp()
    optimizer = flatlora.GGPOOptimizer(sgd(trained(model)), model, sigma=0.2, noise="low_rank", seed=0)
    optimizer.param_groups[0]["lr"] = 0.0
    for i in range(70):
        x, y = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(i))
        (unit * (model(x) - y).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    said = [record.getMessage() for record in caplog.records if "raised the loss" in record.getMessage()]
    assert len(said) == (told is not None), optimizer.metrics()
    assert all(told in one and "sigma" in one for one in said)


@every_method(among=MEASURED[:4])
def test_it_goes_on_after_a_resume_and_starts_afresh_without(method: Method) -> None:
    model, optimizer = started(method)
    for i in range(3):
        model(**batch(i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    _, other = started(method)
    other.load_state_dict(state)
    torch.testing.assert_close(torch.stack(other._source.rise.mean()), torch.stack(optimizer._source.rise.mean()))
    assert other._source.rise.samples == optimizer._source.rise.samples > 0
    (part,) = state["flatlora"].values()
    with pytest.raises(ValueError, match="sums of the loss rise"):
        other.load_state_dict(
            {**state, "flatlora": {type(other).__name__: {**part, "rise": {"samples": 1, "sums": 2}}}}
        )
    older = {key: value for key, value in part.items() if key != "rise"}
    other.load_state_dict({**state, "flatlora": {type(other).__name__: older}})
    assert other._source.rise.samples == 0


@pytest.mark.parametrize("method", MEASURED[:3], ids=lambda method: method.name)
def test_first_layers_under_dropout_tell_too(method: Method) -> None:
    """Their input requires no gradient, and their adapters stand in another product."""
    model, optimizer = started(method, dropout=1e-9)
    layers = list(optimizer._source.layers)
    for i in range(2):
        expected = derivative(
            model, optimizer, [batch(i)], optimizer._source.measured() if "gaussian" in method.name else None
        )
        loss = model(**batch(i)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected *= 0.5 * len(layers) if "gaussian" in method.name else 0.5 if "GGPO" in method.name else 1.0
        assert optimizer._source.rise.value.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_gaussian_noise_is_measured_all_over_the_depth_of_a_model() -> None:
    """A mean over some tens of steps is near that over all layers, whatever the rise of each."""
    _, optimizer = started(PERTURBING[0])
    source = optimizer._source
    for count in (1, 2, 7, 36, 224, 560):
        source.layers = {str(i): None for i in range(count)}
        visited = []
        for source.step in range(count):
            visited.append(int(source.measured()))
        assert sorted(visited) == list(range(count))
        means = [sum(visited[i : i + 50]) / 50 for i in range(0, count - 50, 25)]
        assert all(abs(mean / (count / 2) - 1) < 0.1 for mean in means)


def test_a_thousand_micro_batches_in_half_precision_add_up() -> None:
    rise = LossRise()
    for _ in range(1000):
        rise.record("layer", torch.full((1, 1), 0.1, dtype=torch.bfloat16))
    rise.read()
    assert rise.value.item() == pytest.approx(100, rel=2e-3)
