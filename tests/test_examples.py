"""The README's code runs as it is printed, and the examples run from end to end, cut short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ecosystem import tiny_llama, tokens
from peft import PeftModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import quickstart  # noqa: E402

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_code(block, tmp_path):
    batches = [{"input_ids": tokens(i), "labels": tokens(i)} for i in range(2)]
    rows = [{"input_ids": tokens(i)[0], "labels": tokens(i)[0]} for i in range(8)]
    names = {
        "torch": torch,
        "model": tiny_llama(),
        "model_4bit": tiny_llama(quant="nf4"),
        "dora_model": tiny_llama(use_dora=True),
        "base_model": tiny_llama().unload(),
        "dataloader": batches,
        "train_dataloader": batches[:1],
        "val_dataloader": batches[1:],
        "dataset": rows,
        "output_dir": str(tmp_path),
    }
    model = next(names[name] for name in ("model_4bit", "dora_model", "base_model", "model") if name in block)
    exec(compile(block, "README.md", "exec"), names)
    if "step()" not in block and "train()" not in block:  # it stops where the reader's own loop begins
        model.train()(**batches[0]).loss.backward()
        names["optimizer"].step()
    assert any(p.count_nonzero() for name, p in model.named_parameters() if "lora_B" in name or "gralora_B" in name)
    if "save_gralora" in block:
        loaded = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path)
        torch.testing.assert_close(loaded.eval()(**batches[0]).logits, model.eval()(**batches[0]).logits)


def run_example(name, *arguments):
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    """Sentences whose label is plain from one word."""
    words = {"good": "1", "bad": "0"}
    nouns = ["film", "plot", "cast", "song", "book", "meal", "view", "ride"]
    lines = [f"{label}\tthe {noun} was {word}" for noun in nouns for word, label in words.items()]
    path = tmp_path_factory.mktemp("data") / "train.tsv"
    path.write_text("\n".join(["label\tsentence", *lines]), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 0.5])
def test_quickstart(wrong, tsv, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    out = run_example(
        *("quickstart.py", "--train-file", tsv, "--examples", 4, "--epochs", 1, "--wrong", wrong, "--picture", picture)
    )
    assert f"{round(4 * wrong)} of them with a wrong label" in out and "One seed" in out
    share = r"\d+ % +" if wrong else ""
    for name in (
        "LoRA, lr 0.001",
        "LoRASAM, ρ 0.15, lr 0.001",
        "LoRASAM in GGPO, lr 0.001",
        "LoRA, lr 0.00035",
    ):
        assert re.search(rf"^{name} +[\d.]+ % +[\d.]+ +{share}\d+ ms$", out, re.MULTILINE)
    assert picture.stat().st_size > 1000


def test_the_quickstart_draws_its_rows():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    rows, figure = quickstart.rows_of(1e-3), Figure()
    for i, row in enumerate(rows):
        row.accuracy, row.memorised = [0.1 * i, 0.5], [0.2, 0.1 * i]
    quickstart.draw(rows, figure)
    for axes, name in zip(figure.axes, ("accuracy", "memorised"), strict=True):
        lines = axes.get_lines()
        assert [line.get_label() for line in lines] == [row.name for row in rows]
        for line, row in zip(lines, rows, strict=True):
            assert line.get_xdata().tolist() == [1, 2]
            assert line.get_ydata().tolist() == pytest.approx([100 * value for value in getattr(row, name)])
    assert figure.axes[-1].get_legend() is not None


@pytest.mark.slow
def test_trainer_and_resume(tsv, tmp_path):
    arguments = [
        "--train-file",
        tsv,
        "--examples",
        6,
        "--epochs",
        2,
        "--output",
        tmp_path / "run",
        "--method",
        "bilora",
    ]
    straight = run_example("trainer.py", *arguments)
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed = run_example("trainer.py", *arguments, "--resume")
    assert straight.splitlines()[-1] == resumed.splitlines()[-1]
    assert "held-out accuracy" in resumed


@pytest.mark.slow
def test_bilora_loop(tsv):
    out = run_example("bilora.py", "--train-file", tsv, "--examples", 4, "--epochs", 1)
    assert "Bi-LoRA(AdamW): held-out accuracy" in out


def test_an_unreadable_file_is_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--train-file", str(tmp_path / "none.tsv")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot read")
