"""What can be told of a GPU without one: no read on the host, no mixture of devices, and few operators per step."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import Counting, OneDevice
from methods import batch, every_method, fill, plain
from models import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def model_of(method, layers, device):
    torch.manual_seed(0)
    model = method.adapt(llama(32, num_hidden_layers=layers), r=4, dropout=0.0)
    fill(model)
    return model.train().to(device)


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def train(model, optimizer, device, steps):
    batches = [{key: value.to(device) for key, value in batch(i).items()} for i in range(steps)]
    for each in batches:
        model(**each).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def autocast_of_meta(monkeypatch):
    """transformers asks for it, and older versions of torch raise."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: "meta" not in kind and asked(*kind))


@every_method(xfail={"BiDoRA": "it reads each pass's loss, to refuse one that is not finite"})
def test_a_step_neither_waits_for_the_device_nor_leaves_it(method, autocast_of_meta):
    """On the meta device there is nothing to read, so whatever would stall a GPU raises."""
    model = model_of(method, 2, "meta")
    optimizer = method.start(model, sgd)
    batches = [{key: value.to("meta") for key, value in batch(i).items()} for i in range(3)]
    with OneDevice("meta") as watching:
        for each in batches:
            model(**each).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watching.count > 1000
    assert watching.mixed == set()
    assert all(p.is_meta for p in model.parameters())


def test_what_it_looks_for_is_seen():
    with OneDevice("meta") as watching:
        x = torch.ones(3, device="meta")
        x.copy_(torch.ones(3))
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            x.sum().item()
    assert any("copy_" in name for name, *_ in watching.mixed)


# Of each method over four layers of seven projections, in eight steps, how many operators more than plain training of
# the same adapters. No more than that: lower a number when the method has got cheaper.
MOST = {
    "GGPO gaussian": 5155,
    "GGPO low_rank": 5872,
    "LoRASAM": 6080,
    "Bi-LoRA": 3256,
    "BiDoRA": 34680,
    "GraLoRA": 0,
    "GraLoRA under GGPO": 9721,
}


@functools.cache
def operators(method, layers, start):
    """Of eight steps, in which GGPO has looked at every layer's weights, once the first are over."""
    model = model_of(method, layers, "cpu").double()  # whose noise is drawn as on a GPU, by one operator
    optimizer = start(model, sgd)
    train(model, optimizer, "cpu", 2)
    with Counting() as counting:
        train(model, optimizer, "cpu", 8)
    return counting.count


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions of torch break operators into others")
@every_method()
def test_a_step_launches_no_more_operators_than_it_did(method):
    assert operators(method, 4, method.start) - operators(method, 4, plain) <= MOST[method.name]


@every_method()
def test_operators_grow_no_faster_than_layers(method):
    one, two, four = (operators(method, layers, method.start) for layers in (1, 2, 4))
    # Which layer's Gaussian noise is measured in a step depends on their number, and layers differ by some operators.
    assert four - two <= 2 * (two - one) + 20
