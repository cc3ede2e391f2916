"""Runs that are killed at random moments and resumed in new processes end with the bits of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings

import pytest
import torch
from helpers import loss_of
from models import WIDE, lora_mlp, trainable
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora import (
    BilevelOptimizer,
    BiLoRAOptimizer,
    GGPOOptimizer,
    apply_gralora,
    direction_parameters,
    magnitude_parameters,
)

STEPS, KILLS = 40, 20


def adam8(params, **kwargs):
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(params, lr=1e-3, **kwargs)


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE))


def ggpo(noise):
    def start():
        model = lora_mlp(width=WIDE, r=8, dropout=0.1)
        return model, GGPOOptimizer(adam8(trainable(model)), model, sigma=0.1, beta=0.5, noise=noise, seed=1)

    return start


def bilora():
    model = lora_mlp(width=WIDE, r=8, dropout=0.1)
    return model, BiLoRAOptimizer.for_model(model, adam8, rho=0.05, seed=1)


def gralora():
    model = apply_gralora(plain_net(), ["0", "2"], r=8, k=2, dropout=0.1).train()
    return model, GGPOOptimizer(adam8(trainable(model)), model, sigma=0.1, beta=0.5, seed=1)


def bidora():
    config = LoraConfig(r=8, target_modules=["0", "2"], lora_dropout=0.1, use_dora=True, init_lora_weights=False)
    model = get_peft_model(plain_net(), config).train()
    levels = adam8(direction_parameters(model)), adam8(magnitude_parameters(model))
    loss_fn = lambda model, i: loss_of(model, i, WIDE)  # noqa: E731
    return model, BilevelOptimizer(*levels, model, list(range(7)), list(range(7, 12)), loss_fn=loss_fn)


METHODS = {
    "gaussian": ggpo("gaussian"),
    "low_rank": ggpo("low_rank"),
    "bilora": bilora,
    "gralora": gralora,
    "bidora": bidora,
}


def train(method, folder):
    """Trains from the last checkpoint in `folder` to the end, writing one every few steps, and then the result."""
    warnings.simplefilter("ignore")
    torch.manual_seed(7)
    model, optimizer = METHODS[method]()
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["weights"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["stream"])
        first = saved["step"]
    for step in range(first, STEPS):
        if method == "bidora":
            optimizer.step()
        else:
            loss_of(model, step, WIDE).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % 3 == 0:
            weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
            state = {"weights": weights, "optimizer": optimizer.state_dict(), "stream": torch.get_rng_state()}
            torch.save({**state, "step": step + 1}, folder / "new.pt")
            os.replace(folder / "new.pt", checkpoint)
    torch.save([p.detach() for p in trainable(model)], folder / "result.pt")


def process(method, folder, patience=None):
    """Runs `train` in a process of its own; kills it after `patience` seconds. Returns whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(method, folder)
            code = 0
        finally:
            os._exit(code)
    if patience is not None:
        time.sleep(patience)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("method", METHODS)
def test_twenty_kills_change_nothing(method, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    start = time.perf_counter()
    assert process(method, straight)
    whole, moments = time.perf_counter() - start, random.Random(method)
    # Short enough that most are killed on the way, some while they write.
    ended = [process(method, killed, patience=moments.uniform(0.1, 0.5) * whole) for _ in range(KILLS)]
    assert process(method, killed) and not all(ended)
    results = [torch.load(folder / "result.pt") for folder in (straight, killed)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
