"""What every method does on a GPU is what it does on the CPU; and a step there stays there."""

from __future__ import annotations

import copy
from dataclasses import replace

import models
import pytest
import torch
from helpers import HostReads, OneDevice, sgd
from methods import adapted, batch, every_method, logits, train, weights

import flatlora
from flatlora.kernels import draw
from flatlora.perturbation import products

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

# How far results may be from the CPU's, relatively, on tests/fakecuda, which has its kernels. BiDoRA's second term is a
# difference of gradients, and the correlation one of differences of norms.
MOST = {"BiDoRA": 2e-5, "metrics: update_correlation": 1e-4}


def far(found, expected, method):
    """The names of the values in `found` that are not those in `expected`."""
    slack = 1 if torch.cuda.get_device_name() == "fake" else 100
    errors = {
        name: (found[name].cpu() - value).norm() / value.norm().clamp(min=1e-6) for name, value in expected.items()
    }
    return {
        name: error for name, error in errors.items() if error > slack * MOST.get(name, MOST.get(method.name, 1e-6))
    }


@pytest.fixture
def drawn_on_the_cpu(monkeypatch):
    """The same noise wherever it is used: every kind of device has its own."""

    drawn = draw.draw_gaussian

    def gaussian(noise, n, weight, dtype):
        weight = None if weight is None else weight.cpu()
        return drawn(replace(noise, std=noise.std.cpu()), n, weight, dtype).to(noise.std.device)

    def low_rank(noise, n, dtype):
        return tuple(
            factor.to(noise.std.device) for factor in draw.draw_low_rank(replace(noise, std=noise.std.cpu()), n, dtype)
        )

    monkeypatch.setattr(products, "draw_gaussian", gaussian)
    monkeypatch.setattr(draw, "draw_gaussian", gaussian)
    monkeypatch.setattr(products, "draw_low_rank", low_rank)


def merged(model):
    model = copy.deepcopy(model).eval()
    return model.merge_and_unload() if hasattr(model, "peft_config") else flatlora.merge_gralora(model)


def after_steps(method, device, monkeypatch, **kwargs):
    monkeypatch.setattr(models, "DEVICE", torch.device(device))
    model = adapted(method)
    if kwargs.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = method.start(model, sgd)
    losses = train(model, optimizer, range(3))
    metrics = getattr(optimizer, "metrics", dict)()
    found = weights(model) | {f"metrics: {name}": value for name, value in metrics.items()}
    assert {value.device.type for value in found.values()} == {device}
    model.zero_grad()
    return found | {"losses": torch.tensor(losses), "merged": logits(merged(model))}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@every_method()
def test_steps_metrics_and_merged_weights_are_those_of_the_cpu(
    method, checkpointing, device, drawn_on_the_cpu, monkeypatch
):
    """In float32, with two micro-batches a step."""
    if device.type == "cpu":
        pytest.skip("compares another device with the CPU")
    found, expected = (after_steps(method, kind, monkeypatch, checkpointing=checkpointing) for kind in ("cuda", "cpu"))
    assert found.keys() == expected.keys()
    assert far(found, expected, method) == {}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@every_method()
def test_a_step_stays_on_its_device_and_the_host_reads_nothing(method, autocast, device):
    """But for BiDoRA, which refuses a loss that is not finite."""
    if device.type == "cpu":
        pytest.skip("the host has all that is on the CPU")
    model = adapted(method)
    optimizer = method.start(model, sgd)
    batches = [batch(i) for i in range(4)]

    def step(data):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for data in batches[:2]:  # a method's first steps look at what they work on
        step(data)
    with OneDevice("cuda") as watching, HostReads() as reads:
        for data in batches[2:]:
            step(data)
    assert watching.count > 100
    assert reads.places == ({"bidora/passes.py"} if method.name == "BiDoRA" else set())
    assert reads.count == (2 if method.name == "BiDoRA" else 0)  # one an iteration
    assert watching.mixed == ({("aten._to_copy.default", "cpu", "cuda")} if reads.places else set())


def test_what_the_host_reads_is_seen(device):
    x = torch.ones(3, device=device)
    with HostReads() as reads:
        x.sum().item()
    assert reads.count == (device.type != "cpu")
