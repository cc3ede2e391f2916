"""Training texts of a run: where they come from, wrong labels, and the split that learning rates are chosen on."""

from __future__ import annotations

import argparse
import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

from common import Data, Example, load_data, read_tsv, unique

TEXT_COLUMNS = ("sentence", "text", "content", "question")
LABEL_COLUMNS = ("label", "labels", "class", "topic")


@dataclass(frozen=True)
class Texts:
    """The user's data, and `other`: test texts of another domain, with labels of the same names."""

    data: Data
    other: list[Example]

    @property
    def name(self) -> str:
        """The data's name and a digest of all texts and labels, so that results of other data are told apart."""
        examples = [*self.data.pool, *self.data.held_out, *self.other]
        lines = "\n".join(f"{example.label}\t{example.text}" for example in examples)
        return f"{self.data.name}:{hashlib.sha256(lines.encode()).hexdigest()[:10]}"


def load_texts(args: argparse.Namespace) -> Texts:
    """What the arguments name: a data set of the `datasets` library, TSV files, or news headlines."""
    if args.dataset is not None:
        if args.train_file is not None or args.test_file is not None:
            raise SystemExit("error: --dataset takes the place of --train-file and --test-file")
        data = load_named(args.dataset)
    else:
        data = load_data(args.train_file, args.test_file)
    data = replace(data, held_out=data.held_out[: args.test_texts])
    return Texts(data, [] if args.other_test_file is None else other_domain(args.other_test_file, data))


def load_second(args: argparse.Namespace) -> Texts | None:
    """The texts of the second task, if the arguments name one."""
    if args.second_file is None:
        return None
    data = load_data(args.second_file, args.second_test_file)
    return Texts(replace(data, held_out=data.held_out[: args.test_texts]), [])


def other_domain(path: Path, data: Data) -> list[Example]:
    """Test texts from another file, without those of the training data."""
    examples = unique(read_tsv(path), but=data.pool)
    unknown = sorted({example.label for example in examples} - set(data.labels))
    if unknown:
        raise SystemExit(f"error: {path} has the labels {unknown[:5]}, which {data.name} has not: {data.labels[:5]}")
    return examples


def load_named(name: str) -> Data:
    """A data set by its name or folder, `NAME` or `NAME:CONFIGURATION`, as the `datasets` library finds it."""
    try:
        from datasets import load_dataset
    except ImportError as reason:
        raise SystemExit("error: --dataset needs the datasets library: pip install datasets") from reason
    path, _, configuration = name.partition(":")
    try:
        splits = load_dataset(path, configuration or None)
    except (OSError, ValueError, RuntimeError) as reason:
        raise SystemExit(f"error: --dataset {name}: {reason}") from reason
    if "train" not in splits:
        raise SystemExit(f"error: --dataset {name} has no split named train, but {sorted(splits)}")
    pool = unique(split_examples(name, splits["train"]))
    labels = sorted({example.label for example in pool})
    test = next((splits[split] for split in ("test", "validation") if split in splits), None)
    held_out = [] if test is None else [e for e in unique(split_examples(name, test)) if e.label in labels]
    if not held_out:  # no test split, or one that hides its labels
        random.Random(0).shuffle(pool)
        pool, held_out = pool[: len(pool) // 2], pool[len(pool) // 2 :]
    return Data(path.rstrip("/").rpartition("/")[2], unique(pool, but=held_out), held_out, labels)


def split_examples(name: str, split: object) -> list[Example]:
    """Texts and labels of one split, a label by its name where the data set names them."""
    columns = list(split.column_names)  # type: ignore[attr-defined]
    text = next((column for column in TEXT_COLUMNS if column in columns), None)
    label = next((column for column in LABEL_COLUMNS if column in columns), None)
    if text is None or label is None:
        raise SystemExit(
            f"error: --dataset {name} needs a column of {TEXT_COLUMNS} and one of {LABEL_COLUMNS}, got {columns}"
        )
    feature = split.features[label]  # type: ignore[attr-defined]
    names = getattr(feature, "names", None)
    return [
        Example(str(one).strip(), str(names[of] if names and of >= 0 else of))
        for one, of in zip(split[text], split[label], strict=True)  # type: ignore[index]
    ]


@dataclass(frozen=True)
class Training:
    """The training examples of one seed as every method gets them, and what is held out of them.

    `wrong` marks the examples of `examples` whose label was changed.
    """

    examples: list[Example]
    wrong: list[bool]
    validation: list[Example]


def flip_labels(
    examples: list[Example], share: float, labels: list[str], seed: int
) -> tuple[list[Example], list[bool]]:
    """A share of the examples gets another label, drawn evenly; which and what depends on `seed` alone.

    The examples of a smaller share are among those of a larger one.
    """
    rng = random.Random(f"flip {seed}")
    order = rng.sample(range(len(examples)), len(examples))
    drawn = {i: rng.choice([label for label in labels if label != examples[i].label]) for i in order}
    chosen = set(order[: round(share * len(examples))])
    given = [replace(example, label=drawn[i]) if i in chosen else example for i, example in enumerate(examples)]
    return given, [i in chosen for i in range(len(examples))]


def training_data(data: Data, count: int, flip: float, validation: float, seed: int) -> Training:
    """`count` examples with a share `flip` of wrong labels; a share `validation` of them, as they are, is held out."""
    examples, wrong = flip_labels(data.draw(count, seed)[0], flip, data.labels, seed)
    order = random.Random(f"validation {seed}").sample(range(count), count)
    held_out = set(order[: round(validation * count)])
    kept = [i for i in range(count) if i not in held_out]
    return Training([examples[i] for i in kept], [wrong[i] for i in kept], [examples[i] for i in sorted(held_out)])
