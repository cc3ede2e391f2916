"""What a GPU is trained with: half precision, loss scaling, bitsandbytes' optimizers, side streams, `torch.compile`.

Every test is run on the CPU too, so that without a GPU all but the device has been seen. `conftest.py` names the other
files that are run on both.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers import adamw, difference, sgd
from methods import METHODS, OF_PEFT, adapted, base_bits, batch, every_method, logits, twin, weights
from models import trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]

# BiDoRA's passes are its own, and run where its caller's autocast and scaler are not; its laws are tested elsewhere.
IN_A_LOOP = [method for method in METHODS if method.name != "BiDoRA"]


def assert_trains(model, method, optimizer, loop):
    """A run of the user's `loop` lowers the loss, leaves the base alone, and the plain model unperturbed."""
    before, start = base_bits(model), weights(model)
    losses = [loop(i) for i in range(12)]
    assert losses[-1] < losses[0]
    assert difference(before, base_bits(model)) is None
    assert difference(start, weights(model)) is not None
    assert all(value.isfinite().all() for value in weights(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_method(among=IN_A_LOOP)
def test_it_trains_under_autocast_and_a_gradient_scaler(method, dtype, device):
    model = adapted(method)
    optimizer = method.start(model, adamw)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype == torch.float16)

    def loop(i):
        with torch.autocast(device.type, dtype):
            loss = model(**batch(0)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return float(loss.detach())

    assert_trains(model, method, optimizer, loop)
    with torch.no_grad(), torch.autocast(device.type, dtype):
        assert difference(logits(model), logits(twin(model, method))) is None


@every_method(among=IN_A_LOOP)
def test_a_step_that_the_scaler_skips_changes_nothing(method, device):
    model = adapted(method)
    optimizer = method.start(model, adamw)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    before, noisy = weights(model), logits(model)
    scaler.scale(model(**batch(0)).loss).backward()
    trained(model)[0].grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert difference(before, weights(model)) is None
    assert difference(noisy, logits(model)) is None
    assert scaler.get_scale() == 2.0**9


@every_method(among=IN_A_LOOP)
def test_it_trains_a_bf16_model_by_a_paged_8_bit_optimizer(method, device):
    bnb = pytest.importorskip("bitsandbytes")
    pages = device.type == "cuda"  # states of 100,000 elements and more
    model = adapted(method, **({"width": 1024, "r": 128} if pages else {"width": 128, "r": 32})).to(torch.bfloat16)
    optimizer = method.start(model, lambda params: bnb.optim.PagedAdamW8bit(params, lr=1e-3))

    def loop(i):
        loss = model(**batch(0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    assert_trains(model, method, optimizer, loop)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert any(getattr(moment, "is_paged", False) for moment in moments) == pages


@every_method(among=IN_A_LOOP)
def test_a_step_on_a_side_stream_is_that_of_the_main_one(method, device):
    """Forward and backward on another stream, which autograd has backward follow, and the update on the first."""
    runs = []
    for aside in (False, True):
        model = adapted(method)
        optimizer = method.start(model, sgd)
        on_cuda = device.type == "cuda"
        side = torch.cuda.Stream() if on_cuda and aside else None
        for i in range(3):
            data = batch(i)
            if side is not None:
                side.wait_stream(torch.cuda.current_stream())
            with nullcontext() if side is None else torch.cuda.stream(side):
                model(**data).loss.backward()
            if side is not None:
                torch.cuda.current_stream().wait_stream(side)
            optimizer.step()
            optimizer.zero_grad()
        runs.append((weights(model), logits(model)))
    assert difference(*runs) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@every_method(among=[method for method in IN_A_LOOP if method in OF_PEFT])
def test_a_compiled_model_trains_as_an_eager_one(method, device):
    """With inductor on a GPU; on the CPU, where that takes a compiler, by what it is given."""
    if device.type == "cpu" and method.name not in ("GGPO gaussian", "Bi-LoRA"):
        pytest.skip("the graphs of smaller models are in test_compile.py")
    runs = []
    for compiling in (False, True):
        torch._dynamo.reset()
        model = adapted(method)
        optimizer = method.start(model, sgd)
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        called = torch.compile(model, backend=backend) if compiling else model
        losses = []
        for i in range(3):
            loss = called(**batch(i)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        runs.append((losses, weights(model)))
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-4)
