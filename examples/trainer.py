"""A flat optimizer in the Hugging Face Trainer: accumulation, clipping, schedule, evaluation, checkpoints, resuming.

    pip install "flatlora[examples]"
    python examples/trainer.py  # news headlines, five topics
    python examples/trainer.py --train-file train.tsv --test-file test.tsv --output runs/mine
    python examples/trainer.py --resume                            # go on after an interruption

The only line that differs from a Trainer script without flatlora is the one that wraps the optimizer, and one more if
its numbers are to be logged. While training, texts that are neither trained on nor held out are evaluated; the held-out
ones are evaluated once, at the end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import (
    build_model,
    data_arguments,
    encode,
    encoder_folder,
    load_data,
    load_tokenizer,
    make_optimizer,
    method_arguments,
    non_negative,
    positive,
    quiet,
)
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from flatlora.hf import log_metrics


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser, examples=100)
    parser.add_argument("--output", type=Path, default=Path("runs/trainer"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    method_arguments(parser)
    parser.add_argument("--epochs", type=positive, default=15, help="default: %(default)s")
    parser.add_argument("--lr", type=non_negative, default=5e-4, help="default: %(default)s")
    parser.add_argument("--r", type=positive, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    quiet()
    checkpoint = get_last_checkpoint(args.output) if args.output.is_dir() else None
    if args.resume and checkpoint is None:
        raise SystemExit(f"error: --resume: there is no checkpoint in {args.output}; run once without --resume")

    folder = encoder_folder(args.model)
    data = load_data(args.train_file, args.test_file)
    tokenizer = load_tokenizer(folder)
    examples, rest = data.draw(args.examples, args.seed)
    train, validation, held_out = (
        encode(texts, tokenizer, data.labels) for texts in (examples, rest[:200], data.held_out)
    )

    set_seed(args.seed)
    model = build_model(folder, tokenizer, data.labels, args.r)
    optimizer = make_optimizer(args.method, torch.optim.AdamW, model, args)

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            per_device_eval_batch_size=64,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
    )
    # The classifier's loss is the mean of its micro-batch; without this the Trainer adds these up when it accumulates.
    trainer.model_accepts_loss_kwargs = False
    log_metrics(trainer)  # the method's numbers beside the loss, in the checkpoints' trainer_state.json too
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint if args.resume else None)
    minutes = (time.perf_counter() - start) / 60
    result = trainer.evaluate(held_out)
    print(
        f"\n{data.name}: {len(data.labels)} labels, {len(train)} training and {len(held_out)} held-out texts, "
        f"{trainer.state.global_step} steps, {minutes:.1f} minutes\n"
        f"held-out accuracy {100 * result['eval_accuracy']:.1f} %, loss {result['eval_loss']:.3f}"
    )


if __name__ == "__main__":
    main()
