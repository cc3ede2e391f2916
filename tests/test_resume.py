"""Six steps straight against three, a checkpoint, and three more in a new process."""

from __future__ import annotations

import itertools
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers import adapters, difference, outputs
from methods import train as train_tokens
from models import tiny_llama, trainable
from torch.optim.lr_scheduler import OneCycleLR

from flatlora import GGPOOptimizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]

CASES = list(itertools.product(["gaussian", "low_rank"], ["AdamW", "AdamW8bit"], [None, "nf4"]))


def start(case, seed):
    noise, base, quant = case
    model = tiny_llama(width=256, quant=quant, dropout=0.1)
    if base == "AdamW":
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    else:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-2, weight_decay=0.1)
    optimizer = GGPOOptimizer(optimizer, model, noise=noise, seed=seed, sigma=0.1, beta=1.0)
    return model, optimizer, OneCycleLR(optimizer, 1e-2, total_steps=10)


def save(path, model, optimizer, scheduler):
    state = {
        "model": adapters(model),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.random.get_rng_state(),
    }
    torch.save(state, path)


def ending(model, optimizer):
    """All that can be told of a run: weights, checkpoint, the next noise, the global random numbers."""
    rng = torch.random.get_rng_state()
    torch.manual_seed(0)  # for dropout
    return {
        "adapters": adapters(model),
        "state": optimizer.state_dict(),
        "row_std": optimizer.row_std(),
        "outputs": outputs(model),
        "rng": rng,
    }


def resume(folder):
    """What the new process does: every case from its checkpoint to the end."""
    for i, case in enumerate(CASES):
        model, optimizer, scheduler = start(case, seed=1000 + i)
        state = torch.load(folder / f"{i}.half.pt", weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.random.set_rng_state(state["rng"])
        train_tokens(model, optimizer, range(3, 6), scheduler=scheduler)
        torch.save(ending(model, optimizer), folder / f"{i}.end.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoints, and what a new process made of them."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("resume")
    for i, case in enumerate(CASES):
        model, optimizer, scheduler = start(case, seed=1)
        train_tokens(model, optimizer, range(3), scheduler=scheduler)
        save(folder / f"{i}.half.pt", model, optimizer, scheduler)
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("i", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_a_run_resumed_in_a_new_process_is_the_uninterrupted_one(folder, i):
    model, optimizer, scheduler = start(CASES[i], seed=1)
    train_tokens(model, optimizer, range(6), scheduler=scheduler)
    straight = ending(model, optimizer)
    assert all((std > 0).all() for std in straight["row_std"].values())
    resumed = torch.load(folder / f"{i}.end.pt", weights_only=True)
    assert difference(straight, resumed) is None


if __name__ == "__main__":
    resume(pathlib.Path(sys.argv[1]))
