"""GGPO in the Hugging Face Trainer and under Accelerate, beyond what every method is tested for there."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import adamw, adapters, base_state, difference, ggpo, loss_of, outputs, tokens
from models import lora_mlp, tiny_llama, trainable

import flatlora.perturbation

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


@pytest.fixture
def draws(monkeypatch):
    """The seed of every Gaussian ε that is formed, in order."""
    seeds = []
    draw = flatlora.perturbation.products.draw_gaussian

    def recorded(what, *args):
        seeds.append(what.seed)
        return draw(what, *args)

    monkeypatch.setattr(flatlora.perturbation.products, "draw_gaussian", recorded)
    return seeds


def dataset(first, count):
    return [{"input_ids": ids, "labels": ids} for ids in (tokens(i, batch=1)[0] for i in range(first, first + count))]


def trainer_of(model, optimizer, path, **kwargs):
    arguments = {
        "output_dir": str(path),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "seed": 3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **kwargs,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments),
        train_dataset=dataset(0, 16),
        eval_dataset=dataset(100, 4),
        optimizers=(optimizer, None),
    )


def fresh(wrapped=True, **kwargs):
    model = tiny_llama(dropout=0.1)
    base = adamw(model, weight_decay=0.1)
    return model, ggpo(model, base, **{"sigma": 0.3, **kwargs}) if wrapped else base


def test_trainer_without_noise_is_the_base_optimizer(tmp_path):
    results = []
    for wrapped in (False, True):
        model, optimizer = fresh(wrapped, sigma=0.0)
        trainer = trainer_of(model, optimizer, tmp_path, save_strategy="no")
        trainer.train()
        log = [
            {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second"))}
            for entry in trainer.state.log_history
        ]
        results.append((adapters(model), base_state(optimizer), log))
    assert difference(*results) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_with_gradient_checkpointing_is_the_same_run(tmp_path, draws, reentrant):
    results, counts = [], []
    for checkpointing in (False, True):
        draws.clear()
        model, optimizer = fresh()
        options = {"use_reentrant": reentrant} if checkpointing else None
        trainer = trainer_of(
            model,
            optimizer,
            tmp_path,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=options,
            save_strategy="no",
            eval_strategy="no",
            max_steps=3,
        )
        trainer.train()
        results.append((adapters(model), outputs(model.eval())))
        counts.append(len(draws))
        assert len(set(draws)) == 3 * 7  # one ε per step and layer, over micro-batches and recomputation
    assert counts[1] >= counts[0] + 3 * 2 * 7  # it did recompute
    torch.testing.assert_close(results[0], results[1])


def test_trainer_takes_a_checkpoint_of_the_bare_base_with_a_warning(tmp_path, caplog):
    model, bare = fresh(wrapped=False)
    trainer_of(model, bare, tmp_path).train()
    model, optimizer = fresh()
    trainer = trainer_of(model, optimizer, tmp_path)
    with caplog.at_level(logging.WARNING, logger="flatlora"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "no GGPO part" in caplog.text
    assert trainer.state.global_step == 6


def test_accelerate_prepares_the_optimizer_and_keeps_it_linked():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    model = lora_mlp()
    raw = ggpo(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(raw, 12)
    model, optimizer, scheduler = accelerator.prepare(model, raw, scheduler)
    assert optimizer.optimizer is raw and optimizer.param_groups is raw.base_optimizer.param_groups
    assert {id(p) for p in trainable(model)} == {id(p) for p in raw.param_groups[0]["params"]}
    accelerator.backward(loss_of(model, 0))
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == raw.base_optimizer.param_groups[0]["lr"] < 1e-2
