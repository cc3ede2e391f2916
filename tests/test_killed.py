"""Runs that are killed at random moments and resumed in new processes end with the bits of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings

import pytest
import torch
from helpers import difference
from methods import adapted, every_method, load_weights, train, weights

STEPS = 40


def adam8(params):
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(params, lr=1e-3)


def run(method, folder):
    """Trains from the last checkpoint in `folder` to the end, writing one every few steps, and then the result."""
    warnings.simplefilter("ignore")
    model = adapted(method, dropout=0.1, width=128, r=32)  # large enough for moments of 8 bits
    optimizer = method.start(model, adam8)
    torch.manual_seed(7)
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        load_weights(model, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["stream"])
        first = saved["step"]
    for step in range(first, STEPS):
        train(model, optimizer, range(step, step + 1), micro=1)
        if step % 3 == 0:
            state = {"weights": weights(model), "optimizer": optimizer.state_dict(), "stream": torch.get_rng_state()}
            torch.save({**state, "step": step + 1}, folder / "new.pt")
            os.replace(folder / "new.pt", checkpoint)
    torch.save(weights(model), folder / "result.pt")


def process(method, folder, patience=None):
    """Runs `run` in a process of its own; kills it after `patience` seconds. Returns whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(method, folder)
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
@every_method("GraLoRA")
def test_kills_change_nothing(method, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    start = time.perf_counter()
    assert process(method, straight)
    whole, moments = time.perf_counter() - start, random.Random(method.name)
    kills = 0
    # Short enough to be killed on the way, sometimes while it writes; longer in time, so that it ends on any machine.
    while not process(method, killed, patience=moments.uniform(0.1, 0.4) * whole * 1.05**kills):
        kills += 1
    assert kills >= 2
    results = [torch.load(folder / "result.pt") for folder in (straight, killed)]
    assert difference(*results) is None
