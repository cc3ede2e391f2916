"""How much memory a training step holds, counted in the tensors that operators make: nothing of it is timed."""

from __future__ import annotations

import pytest
import torch
from helpers import Living, sgd
from methods import METHODS, batch, bidora, dora, every_method, fill, lora, plain
from models import Net, llama, peft, quantised, trained
from torch import nn
from transformers.pytorch_utils import Conv1D

import flatlora
from flatlora.kernels.draw import quadruples

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
]
WIDTH = 128


def peak(method, start, checkpointing, adapt=None):
    """Bytes that two steps of two micro-batches add to the model at most: optimizer, auxiliaries and all."""
    quadruples()  # of which noise is made, once in a process
    torch.manual_seed(0)
    model = (adapt or method.adapt)(llama(WIDTH, num_hidden_layers=2), r=8, dropout=0.0)
    fill(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with Living() as living:
        optimizer = start(model, sgd)
        for i in range(2):
            for j in range(2):
                model(**batch(2 * i + j, 16)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return living.peak, sum(p.numel() * p.element_size() for p in trained(model))


# What a method may hold beside PEFT's adapters of the same kind, in the size of those: one weight and its noise, the
# auxiliary, the perturbation, and the algebra of rows in float64.
MULTIPLES = {
    "GGPO gaussian": 2,
    "GGPO low_rank": 4,
    "LoRASAM": 9,
    "Bi-LoRA": 4,
    "BiDoRA": 5,
    "GraLoRA": 1,
    "GraLoRA under GGPO": 2,
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@every_method()
def test_a_step_holds_no_more_than_pefts_and_a_constant(method, checkpointing):
    found, adapters = peak(method, method.start, checkpointing)
    pefts, _ = peak(method, plain, checkpointing, dora if method.build is bidora else lora)
    print(f"{method.name}: {found / pefts:.3f} of PEFT's {pefts}, {(found - pefts) / adapters:.2f} adapters more")
    assert found <= pefts + MULTIPLES[method.name] * adapters


# --- no (m, n) tensor outlives its product --------------------------------------------------------------------------

M, N = 256, 192


def over(method, kind, dropout):
    """One adapted layer over a base of a kind, with the optimizer of a method."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    if kind in ("nf4", "int8"):
        fc = quantised(nn.Linear(N, M, bias=False), kind)
    else:
        fc = (Conv1D(M, N) if kind == "conv1d" else nn.Linear(N, M, bias=False)).to(dtype)
    net = Net(fc)
    if method.adapt is lora:
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "nf4", kind == "int8"
        model = peft(net, ["fc"], None, lora_dropout=dropout, fan_in_fan_out=kind == "conv1d")
    else:
        model = flatlora.apply_gralora(net, ["fc"], r=4, k=2, alpha=8, dropout=dropout)
    fill(model)
    return model.train(), method.start(model, sgd), dtype


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["fp32", "conv1d", "bf16", "nf4", "int8", "autocast"])
@every_method(among=[method for method in METHODS if method.build is not bidora])
def test_nothing_of_a_weights_size_outlives_its_product(method, kind, dropout):
    model, optimizer, dtype = over(method, kind, dropout)
    x = torch.randn(5, N, dtype=dtype, requires_grad=True)
    size = M * N * {"autocast": 2, "int8": 1}.get(kind, dtype.itemsize)
    for _ in range(2):  # bitsandbytes and the noise set something up in the first
        with Living(size) as living:
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                out = model(x)
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert living.outlived == set()


def test_a_weight_that_is_kept_is_seen():
    weight, x = torch.randn(M, N), torch.randn(5, N)
    with Living(4 * M * N) as living:
        noisy = weight + 0.1
        torch.mm(x, noisy.t()).mm(noisy)
    assert living.outlived == {"add.Tensor"}
