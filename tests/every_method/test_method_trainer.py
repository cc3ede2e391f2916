"""Every method in the Hugging Face Trainer: accumulation, clipping, evaluation, and a resumed run to the bit."""

from __future__ import annotations

import pytest
import torch
from helpers import adamw, difference
from methods import adapted, base_bits, every_method, logits, plain, twin, weights
from methods import batch as batch_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


def examples(first, count):
    return [{key: value[0] for key, value in batch_of(i, 1).items()} for i in range(first, first + count)]


def trainer_of(model, optimizer, path):
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        seed=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = {"train_dataset": examples(0, 16), "eval_dataset": examples(100, 4)}
    return transformers.Trainer(model, arguments, optimizers=(optimizer, None), **data)


def losses(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@every_method()
def test_the_trainer_trains_evaluates_and_resumes_to_the_bit(method, tmp_path):
    model = adapted(method, dropout=0.1)
    before, start = base_bits(model), weights(model)
    optimizer = method.start(model, adamw)
    straight = trainer_of(model, optimizer, tmp_path / "straight")
    straight.train()
    assert straight.state.global_step == 4
    assert difference(before, base_bits(model)) is None
    assert difference(start, weights(model)) is not None

    # It evaluated the plain model.
    own = twin(model, method, dropout=0.1)
    clean = trainer_of(own, plain(own, adamw), tmp_path / "plain").evaluate()["eval_loss"]
    assert losses(straight, "eval_loss")[-1] == clean

    other = adapted(method, dropout=0.1, seed=0)
    resumed_optimizer = method.start(other, adamw, seed=1234)
    resumed = trainer_of(other, resumed_optimizer, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for key in ("loss", "grad_norm", "eval_loss"):
        assert losses(straight, key) == losses(resumed, key) and len(losses(resumed, key)) == 4
    assert difference(weights(model), weights(other)) is None
    assert difference(optimizer.state_dict(), resumed_optimizer.state_dict()) is None
    found = []
    for which in (model, other):
        torch.manual_seed(0)
        found.append(logits(which.train()))
    assert difference(*found) is None
