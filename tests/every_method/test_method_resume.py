"""Every method: six steps straight against three, a checkpoint, and three more in a new process.

Over float weights by AdamW, and over 4-bit weights by an optimizer whose moments have 8 bits.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import adamw, difference
from methods import METHODS, adapted, every_method, load_weights, logits, train, weights
from processes import context
from torch.optim.lr_scheduler import OneCycleLR

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


def adam8(params):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=1e-2, weight_decay=0.1)


FORMS = {"float": ({}, adamw), "nf4": ({"quant": "nf4", "width": 128, "r": 32}, adam8)}
RUNS = list(itertools.product(METHODS, FORMS))


def begin(method, form, seed):
    size, base = FORMS[form]
    model = adapted(method, dropout=0.1, **size)
    optimizer = method.start(model, base, seed=seed)
    return model, optimizer, OneCycleLR(optimizer, 1e-2, total_steps=10)


def go_on(model, optimizer, scheduler, steps):
    for i in steps:
        train(model, optimizer, range(i, i + 1))
        scheduler.step()


def ending(model, optimizer):
    """All that can be told of a run: weights, checkpoint, the next pass, the global random numbers."""
    rng = torch.get_rng_state()
    torch.manual_seed(0)  # for dropout
    return {"weights": weights(model), "state": optimizer.state_dict(), "logits": logits(model), "rng": rng}


def resume(folder):
    """What the new process does: every method from its checkpoint to the end."""
    torch.set_num_threads(1)
    for method, form in RUNS:
        torch.manual_seed(1000)
        model, optimizer, scheduler = begin(method, form, seed=1000)
        saved = torch.load(folder / f"{method.name} {form}.half.pt", weights_only=True)
        load_weights(model, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        go_on(model, optimizer, scheduler, range(3, 6))
        torch.save(ending(model, optimizer), folder / f"{method.name} {form}.end.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoints, and what a new process made of them."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("resume")
    for method, form in RUNS:
        model, optimizer, scheduler = begin(method, form, seed=1)
        torch.manual_seed(5)
        go_on(model, optimizer, scheduler, range(3))
        state = {
            "weights": weights(model),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, folder / f"{method.name} {form}.half.pt")
    process = context().Process(target=resume, args=(folder,))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("form", FORMS)
@every_method()
def test_a_run_resumed_in_a_new_process_is_the_uninterrupted_one(folder, method, form):
    model, optimizer, scheduler = begin(method, form, seed=1)
    torch.manual_seed(5)
    go_on(model, optimizer, scheduler, range(6))
    resumed = torch.load(folder / f"{method.name} {form}.end.pt", weights_only=True)
    assert difference(ending(model, optimizer), resumed) is None
