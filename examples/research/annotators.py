"""Real label noise: sentences that annotators disagreed on, each with one annotator's label, and those they agreed on.

    pip download vaderSentiment==3.3.2 --no-deps --no-binary :all:
    python examples/research/annotators.py vaderSentiment-3.3.2.tar.gz --kind movieReviewSnippets --folder data
    python examples/research/compare.py --train-file data/disputed.tsv --test-file data/agreed.tsv

Hutto & Gilbert (ICWSM 2014; the ratings are in their package, under MIT) had each sentence rated from -4 to 4 by
fifteen people and more. Here a rating above 0 says positive, one below it negative. Sentences that most annotators
found neutral are left out. Of the others those without a minority are agreed on; the rest, or those with a minority of
`--minority` at least, are disputed.
"""

from __future__ import annotations

import argparse
import ast
import random
import tarfile
from pathlib import Path

KINDS = ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")
Labelled = list[tuple[str, str]]  # label, sentence


def ratings(archive: Path, kind: str) -> list[tuple[str, list[int]]]:
    """Every sentence of a kind with its ratings, from the package's source archive."""
    with tarfile.open(archive) as package:
        names = [name for name in package.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz")]
        if not names:
            raise SystemExit(f"error: {archive} holds no hutto_ICWSM_2014.tar.gz; download vaderSentiment's sources")
        with tarfile.open(fileobj=package.extractfile(names[0])) as data:

            def rows(name: str, columns: int) -> list[list[str]]:
                file = data.extractfile(f"hutto_ICWSM_2014/{kind}_{name}.txt")
                assert file is not None
                lines = file.read().decode("utf-8-sig", errors="replace").splitlines()
                return [line.split("\t", columns - 1) for line in lines if line.strip()]

            sentences = {key: " ".join(text.split()) for key, _, text in rows("GroundTruth", 3)}
            rated = [(key, ast.literal_eval(given)) for key, _, _, given in rows("anonDataRatings", 4)]
    return [(sentences[key], given) for key, given in rated]


def parted(rated: list[tuple[str, list[int]]], minority: float, seed: int) -> tuple[Labelled, Labelled, float]:
    """The disputed sentences with an annotator's label, those agreed on, and the mean minority among the former."""
    generator = random.Random(seed)
    disputed, agreed, shares = [], [], []
    for sentence, given in rated:
        labels = ["positive" if rating > 0 else "negative" for rating in given if rating]
        if not labels or len(labels) < len(given) / 2:
            continue
        share = min(labels.count(label) for label in ("positive", "negative")) / len(labels)
        if share == 0:
            agreed.append((labels[0], sentence))
        elif share >= minority:
            disputed.append((generator.choice(labels), sentence))
            shares.append(share)
    return disputed, agreed, sum(shares) / max(len(shares), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="vaderSentiment's source archive")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path(), help="where disputed.tsv and agreed.tsv go")
    parser.add_argument("--minority", type=float, default=0.0, help="its least share of a disputed sentence's labels")
    parser.add_argument("--seed", type=int, default=0, help="of which annotator's label a disputed sentence gets")
    args = parser.parse_args()
    disputed, agreed, minority = parted(ratings(args.archive, args.kind), args.minority, args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("disputed", disputed), ("agreed", agreed)):
        lines = ["label\tsentence", *("\t".join(row) for row in rows)]
        (args.folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(disputed)} disputed, {100 * minority:.0f} % of the labels in the minority; {len(agreed)} agreed on")


if __name__ == "__main__":
    main()
