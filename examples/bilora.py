"""Bi-LoRA in a training loop of one's own: an auxiliary adapter in an ascent group with a learning rate of its own.

    pip install "flatlora[examples]"
    python examples/bilora.py  # news headlines, five topics
    python examples/bilora.py --train-file train.tsv --test-file test.tsv --rho 0.1

`BiLoRAOptimizer.for_model` does in one line what is spelled out here. Printed beside held-out accuracy and loss is how
far the training loss rises under a worst-case step of the weights, with AdamW and with Bi-LoRA over it.
"""

from __future__ import annotations

import argparse
import random

import torch
from common import (
    build_model,
    data_arguments,
    encode,
    encoder_folder,
    evaluate,
    load_data,
    load_tokenizer,
    make_batches,
    mean_loss,
    non_negative,
    positive,
    quiet,
    trainable,
)
from tqdm import tqdm

from flatlora import BiLoRAOptimizer, attach_auxiliary, detach_auxiliary, worst_case_rise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser, examples=50)
    parser.add_argument("--rho", type=non_negative, default=0.05, help="default: %(default)s")
    parser.add_argument("--epochs", type=positive, default=20, help="default: %(default)s")
    parser.add_argument("--lr", type=non_negative, default=5e-4, help="default: %(default)s")
    parser.add_argument("--ascent-lr", type=non_negative, help="of the auxiliary (default: --lr)")
    parser.add_argument("--r", type=positive, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    quiet()

    folder = encoder_folder(args.model)
    data = load_data(args.train_file, args.test_file)
    tokenizer = load_tokenizer(folder)
    examples, _ = data.draw(args.examples, args.seed)
    rows = encode(examples, tokenizer, data.labels)
    held_out = make_batches(encode(data.held_out, tokenizer, data.labels), tokenizer, 64)

    for name in ("AdamW", "Bi-LoRA(AdamW)"):
        torch.manual_seed(args.seed)
        model = build_model(folder, tokenizer, data.labels, args.r)
        primary = trainable(model)
        if name == "AdamW":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(primary, lr=args.lr)
        else:
            auxiliary = attach_auxiliary(model, r=8)
            ascent = {"params": auxiliary, "ascent": True, "weight_decay": 0.0, "lr": args.ascent_lr or args.lr}
            optimizer = BiLoRAOptimizer(
                torch.optim.AdamW([{"params": primary}, ascent], lr=args.lr), model, rho=args.rho
            )

        shuffle = random.Random(args.seed)
        model.train()
        for _ in tqdm(range(args.epochs), desc=name, unit="epoch"):
            for batch in make_batches(shuffle.sample(rows, len(rows)), tokenizer, 10):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        if isinstance(optimizer, BiLoRAOptimizer):
            print(f"norm of the perturbation at the end: {optimizer.perturbation_norm():.4f} (rho {args.rho})")
            detach_auxiliary(model)
        accuracy, loss = evaluate(model, held_out)
        rise = worst_case_rise(model, mean_loss, make_batches(rows, tokenizer, 50), rho=0.3)
        print(f"{name}: held-out accuracy {100 * accuracy:.1f} %, loss {loss:.3f}; worst-case rise {rise:.4f}")


if __name__ == "__main__":
    main()
