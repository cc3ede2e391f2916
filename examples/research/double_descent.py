"""Test loss over the rank of the adapter: does it rise and fall again, and does weight noise smooth it?

    pip install "flatlora[examples,plot]" scipy
    python examples/research/double_descent.py --runs lora@5e-4 ggpo-low-rank:0.2@5e-4 --flip 0.4 --seeds 0-2
    python examples/research/double_descent.py --runs lora@1e-3 ggpo-low-rank:0.2@1e-3 --flip 0.4 --seeds 0-1 \\
        --ranks 1 4 16 64 --examples 64 --epochs 10 --curve-texts 8 --pictures pictures    # a first look

LoRA-GGPO (arXiv:2502.14538) was made for a "double descent" of LoRA: a test loss that falls with the rank, rises, and
falls again. This trains at every rank, alpha = 2·r, prints the test loss and accuracy, and draws them. All arguments
of compare.py apply; runs are kept in the same results file and are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from common import positive, quiet
from compare import Setting, build_parser, make, of, parse_arguments, parse_settings, regimes, save, title_of
from comparing.data import load_texts
from comparing.report import curves_over, mean_and_error
from comparing.runs import Run
from comparing.store import Store

Series = dict[str, dict[float, list[float]]]


def over_ranks(regime: Run, settings: list[Setting], store: Store, args: argparse.Namespace, measure: str) -> Series:
    """One measure's values by setting and rank."""
    found: Series = {}
    for setting in settings:
        for rank in args.ranks:
            runs = [of(replace(regime, r=rank), setting, seed) for seed in args.seeds]
            values = [store[run][measure] for run in runs if run in store]
            if values:
                found.setdefault(setting.name(), {})[rank] = values
    return found


def bumps(means: list[float]) -> list[int]:
    """Positions of inner peaks: higher than both neighbours."""
    return [i for i in range(1, len(means) - 1) if means[i - 1] < means[i] > means[i + 1]]


def print_table(loss: Series, accuracy: Series, ranks: list[int]) -> None:
    print("| | " + " | ".join(f"r = {rank}" for rank in ranks) + " |\n|" + " --- |" * (len(ranks) + 1))
    for name in loss:
        cells = [mean_and_error(loss[name].get(rank, []), ".3f") for rank in ranks]
        print(f"| {name}: loss | " + " | ".join(cells) + " |")
        cells = [mean_and_error(accuracy[name].get(rank, []), ".1f", 100) for rank in ranks]
        print(f"| {name}: accuracy, % | " + " | ".join(cells) + " |")
    print()
    for name, by_rank in loss.items():
        peaks = [list(by_rank)[i] for i in bumps([statistics.mean(values) for values in by_rank.values()])]
        print(f"{name}: mean test loss peaks at {peaks}" if peaks else f"{name}: mean test loss has no inner peak")


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    args = parse_arguments(parser=parser)
    quiet()
    settings = [setting for text in args.runs for setting in parse_settings(text, args.lr)]
    with Store(args.results, read_only=args.report_only) as store:
        for regime in regimes(args, load_texts(args).name):
            ranks = [replace(regime, r=rank) for rank in args.ranks]
            make([of(each, s, seed) for seed in args.seeds for each in ranks for s in settings], store, args, "runs")
            loss, accuracy = (over_ranks(regime, settings, store, args, name) for name in ("loss", "accuracy"))
            print(f"\n### {title_of(regime)}, {regime.epochs} epochs\n")
            print_table(loss, accuracy, args.ranks)
            if args.pictures is not None:
                title = f"{title_of(regime)}, {regime.epochs} epochs"
                save(curves_over(loss, "rank", "test loss", title), args.pictures, f"{title} ranks")


if __name__ == "__main__":
    main()
