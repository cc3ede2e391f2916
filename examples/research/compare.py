"""Compares ways to fine-tune: methods × regimes × seeds, on your own texts, with tables, p-values and pictures.

    pip install "flatlora[examples,plot]" scipy
    python examples/research/compare.py --runs lora@5e-4 ggpo:0.2@5e-4 --flip 0.4 --seeds 0-4  # headlines, five topics
    python examples/research/compare.py --train-file train.tsv --test-file test.tsv --other-test-file elsewhere.tsv
    python examples/research/compare.py --dataset imdb --examples 200 --model FOLDER  # or a decoder's FILE.gguf
    python examples/research/compare.py --runs lora sam ggpo bilora early-stopping --tune 6  # an equal budget for each
    python examples/research/compare.py --model FILE.gguf --generate --examples 64 --then quantise general
    python examples/research/compare.py --then add sequence --second-file movies.tsv  # a second task on the adapters

A run is `method`, `method:strength`, and the learning rates it is made with: `ggpo:0.2@5e-4,1e-3`. Every method starts
from the same weights and sees the same batches, wrong labels (`--flip`) included. Each run is one line of the results
file: start the same command again after a crash or with more seeds, and it goes on where it stopped.

`--tune N` gives every method N candidates of learning rate and strength. They are trained on four fifths of the
training data as you have it, wrong labels included, and scored on the rest; the best is then trained on all of it.
Test data never chooses anything.

`--then` measures what is left of an adapter after training: `quantise`, its merged model in 8, 4 and 3 bits; `merge`,
over an NF4 base and the float one; `scale`, at a part of what was trained; `add`, beside a second task's adapter in one
model; `sequence`, trained on the second task; `general`, a decoder's loss on English text; `detect`, whether losses
tell the wrong labels. Each is a line of the results file, and all are of one training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import data_arguments, non_negative, positive, quiet
from comparing.after import AFTER, LOOKS
from comparing.data import load_second, load_texts
from comparing.methods import METHODS
from comparing.report import (
    CALIBRATION,
    NOTE,
    Grid,
    Values,
    figures_table,
    heat_maps,
    marks,
    mean_landscapes,
    table,
    trade_off,
    training_curves,
)
from comparing.runs import Run, model_name
from comparing.store import Store, results_of
from tqdm import tqdm

from flatlora import plot_landscape

RATES = (1e-4, 1e-3)  # of --tune, from the lowest to the highest
TWO_TASKS = ("add", "sequence")  # of --then


@dataclass(frozen=True)
class Setting:
    """A method with its numbers: a row of the table."""

    method: str
    strength: float
    lr: float

    def name(self) -> str:
        method = METHODS[self.method]
        strength = f", {method.symbol} {self.strength:g}" if method.symbol else ""
        return f"{method.label}{strength}, lr {self.lr:g}"


def parse_settings(text: str, rates: list[float]) -> list[Setting]:
    """`method[:strength][@lr,lr]` as settings; `rates` where it names none."""
    body, _, given = text.partition("@")
    method, _, strength = body.partition(":")
    if method not in METHODS:
        raise SystemExit(f"error: --runs {text}: no method {method!r}; there are {', '.join(METHODS)}")
    strengths = METHODS[method].strengths
    if strength and not strengths:
        raise SystemExit(f"error: --runs {text}: {method} has no strength")
    try:
        chosen = float(strength) if strength else strengths[0] if strengths else 0.0
        return [Setting(method, chosen, lr) for lr in (map(float, given.split(",")) if given else rates)]
    except ValueError as reason:
        raise SystemExit(f"error: --runs {text}: {reason}") from reason


def candidates(method: str, budget: int) -> list[Setting]:
    """`budget` settings of a method: learning rates evenly spaced in the logarithm, for each of its strengths."""
    strengths = METHODS[method].strengths or (0.0,)
    counts = [budget // len(strengths) + (i < budget % len(strengths)) for i in range(len(strengths))]
    low, high = RATES
    return [
        Setting(method, strength, float(f"{low * (high / low) ** (i / max(count - 1, 1)):.2g}"))
        for strength, count in zip(strengths, counts, strict=True)
        for i in range(count)
    ]


# --- the runs -------------------------------------------------------------------------------------------------------


def regimes(args: argparse.Namespace, data: str) -> list[Run]:
    """One run of no method in particular per regime; the others are made from it."""
    return [
        Run(
            data=data,
            model=model_name(args.model),
            examples=examples,
            flip=flip,
            method="lora",
            strength=0.0,
            lr=0.0,
            epochs=epochs,
            batch_size=args.batch_size,
            r=args.r,
            seed=0,
            tuning=False,
            validation=args.validation,
            curve_texts=args.curve_texts,
            schedule=args.schedule,
            task="generate" if args.generate else "classify",
            landscape=args.landscape,
        )
        for examples in args.examples
        for flip in args.flip
        for epochs in args.epochs
    ]


def of(regime: Run, setting: Setting, seed: int, tuning: bool = False) -> Run:
    numbers = {"method": setting.method, "strength": setting.strength, "lr": setting.lr}
    return replace(regime, **numbers, seed=seed, tuning=tuning)


def afterwards(regime: Run, args: argparse.Namespace) -> list[Run]:
    """The regime itself, and once for each word of `--then`."""
    second = load_second(args)
    runs = [regime]
    for name in args.then:
        run = replace(regime, then=name)
        if name in TWO_TASKS and second is not None:
            run = replace(run, second=second.name, second_steps=args.second_steps if name == "sequence" else 0)
        runs.append(run)
    return runs


def make(runs: Iterable[Run], store: Store, args: argparse.Namespace, what: str) -> None:
    """Makes those runs that the results file does not have."""
    missing = [run for run in dict.fromkeys(runs) if run not in store]
    if not missing or args.report_only:
        return
    with tqdm(total=len(missing), unit="run", desc=what, smoothing=0.1) as bar:
        for run, result in results_of(missing, args):
            store.add(run, result)
            bar.set_postfix_str(f"{run.method} {run.lr:g} seed {run.seed}")
            bar.update()


def tuned(regime: Run, methods: list[str], store: Store, args: argparse.Namespace) -> list[Setting]:
    """Of each method the candidate with the best mean accuracy on validation examples, of equals the lower loss."""
    settings = {method: candidates(method, args.tune) for method in methods}
    seeds = args.seeds[: args.tune_seeds]
    make([of(regime, s, seed, True) for seed in seeds for each in settings.values() for s in each], store, args, "tune")
    chosen = []
    for each in settings.values():
        scores = {}
        for setting in each:
            found = [store[run] for seed in seeds if (run := of(regime, setting, seed, True)) in store]
            if len(found) == len(seeds):
                accuracy = statistics.mean(result["validation_accuracy"] for result in found)
                scores[setting] = (accuracy, -statistics.mean(result["validation_loss"] for result in found))
        if scores:
            chosen.append(max(scores, key=lambda setting: scores[setting]))
    return chosen


# --- the report -----------------------------------------------------------------------------------------------------


def rows_of(regime: Run, settings: list[Setting], store: Store, seeds: list[int]) -> dict[Setting, Values]:
    found = {s: {seed: store[run] for seed in seeds if (run := of(regime, s, seed)) in store} for s in settings}
    return {setting: results for setting, results in found.items() if results}


def baselines_of(settings: Iterable[Setting], args: argparse.Namespace) -> dict[Setting, Setting]:
    """What each setting is compared with: LoRA as it was tuned, at --baseline-lr, or at the same learning rate."""
    settings = list(settings)
    lora = {setting.lr: setting for setting in settings if setting.method == "lora"}
    if args.tune:
        fixed = next(iter(lora.values()), None)
    elif args.baseline_lr is not None and args.baseline_lr not in lora:
        raise SystemExit(f"error: --baseline-lr {args.baseline_lr:g}: LoRA has results at {sorted(lora)}")
    else:
        fixed = lora.get(args.baseline_lr)
    pairs = {setting: fixed or lora.get(setting.lr) for setting in settings}
    return {setting: other for setting, other in pairs.items() if other is not None and setting != other}


def title_of(regime: Run) -> str:
    wrong = f", {100 * regime.flip:g} % wrong labels" if regime.flip else ""
    said = ", labels generated" if regime.task == "generate" else ""
    return f"{regime.data.rpartition(':')[0]}, {regime.examples} examples{wrong}{said}"


def report(regime: Run, settings: list[Setting], store: Store, args: argparse.Namespace) -> str:
    """The tables of one regime; its training curves, and the losses around its models, are saved beside it."""
    rows = rows_of(regime, settings, store, args.seeds)
    title = f"{title_of(regime)}, {regime.epochs} epochs"
    if not rows:
        return f"### {title}\n\nno results"
    named = {setting.name(): results for setting, results in rows.items()}
    baselines = {setting.name(): other.name() for setting, other in baselines_of(rows, args).items()}
    if args.pictures is not None:
        save(training_curves(named, title), args.pictures, f"{title} curves")
        if around := mean_landscapes(named):
            plot_landscape(around, picture_path(args.pictures, f"{title} landscapes"))
    parts = [f"### {title}", table(named, baselines, args.measure)]
    if regime.task == "classify":
        parts.append(figures_table(named, baselines, CALIBRATION))
    for run in afterwards(regime, args)[1:]:
        named = {setting.name(): results for setting, results in rows_of(run, settings, store, args.seeds).items()}
        parts += [f"#### {run.then}", figures_table(named, baselines, AFTER[run.then].figures)]
        if args.pictures is not None:
            for name, picture in drawn_after(run, named, f"{title}, {run.then}"):
                save(picture, args.pictures, name)
    return "\n\n".join(parts)


def drawn_after(run: Run, rows: dict[str, Values], title: str) -> Iterator[tuple[str, Any]]:
    """Pictures of what was measured after training, by title: of two figures that trade off, one against the other."""
    after = AFTER[run.then]
    yield title, marks(rows, [figure for figure in after.figures if figure.name.endswith(after.drawn)], title)
    if run.then == "sequence":
        yield f"{title} curve", training_curves(rows, f"{title}: the first task", "first_accuracy", "sequence")
    if run.then == "scale" and run.task == "generate":
        losses = [figure for figure in after.figures if figure.name.endswith("_loss")]
        forgotten = [figure for figure in after.figures if figure.name.endswith("_forgotten")]
        yield f"{title} trade off", trade_off(rows, forgotten, losses, title)


def draw_grids(found: dict[Run, list[Setting]], store: Store, args: argparse.Namespace) -> None:
    """Saves heat maps over learning rates and epochs, a picture per regime, of the methods that ran with several."""
    pictures: dict[str, dict[str, Grid]] = {}
    for regime, settings in found.items():
        for setting, results in rows_of(regime, settings, store, args.seeds).items():
            cells = cells_of(results, regime)
            grids = pictures.setdefault(title_of(regime), {})
            grids.setdefault(setting.name().rpartition(", lr")[0], {}).update(
                {(setting.lr, e): cells[e] for e in cells}
            )
    for title, grids in pictures.items():
        grids = {name: grid for name, grid in grids.items() if len({lr for lr, _ in grid}) > 1}
        if grids:
            save(heat_maps(grids, title), args.pictures, f"{title} heat maps")


def cells_of(results: Values, regime: Run) -> dict[int, float]:
    """Mean accuracy by epochs; at a constant rate every epoch of a run is the end of a shorter run."""
    if regime.schedule == "constant":
        curves = [[point["accuracy"] for point in result["curve"]] for result in results.values()]
        return {epoch: statistics.mean(points) for epoch, points in enumerate(zip(*curves, strict=True), 1)}
    return {regime.epochs: statistics.mean(result["accuracy"] for result in results.values())}


def picture_path(folder: Path, title: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = "-".join("".join(letter if letter.isalnum() else " " for letter in title).split())
    return folder / f"{stem}.png"


def save(figure: Any, folder: Path, title: str) -> None:
    figure.savefig(picture_path(folder, title), dpi=130)


def seed_range(text: str) -> list[int]:
    """`5` or `2-9` or `0,3,4` as seeds."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser, examples=None)
    parser.add_argument("--examples", type=positive, nargs="+", default=[256], help="training examples (256)")
    parser.add_argument("--dataset", metavar="NAME", help="a data set of the datasets library, or NAME:CONFIGURATION")
    parser.add_argument("--other-test-file", type=Path, metavar="TSV", help="test texts of another domain")
    parser.add_argument("--test-texts", type=positive, metavar="N", help="score the first N held-out texts (all)")
    parser.add_argument("--runs", nargs="+", default=["lora", "ggpo"], metavar="RUN", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--lr", type=non_negative, nargs="+", default=[5e-4], help="of runs that name none")
    parser.add_argument("--flip", type=non_negative, nargs="+", default=[0.0], help="shares of wrong labels")
    parser.add_argument("--seeds", type=seed_range, default=seed_range("0-4"), help="such as 0-4 (the default) or 1,3")
    parser.add_argument("--tune", type=positive, metavar="N", help="choose among N candidates of every method")
    parser.add_argument("--tune-seeds", type=positive, default=3, help="of --seeds, the first (default: %(default)s)")
    parser.add_argument("--validation", type=float, default=0.2, help="share held out to choose (default: %(default)s)")
    parser.add_argument("--baseline-lr", type=float, help="compare with LoRA at this rate (default: at the same)")
    parser.add_argument("--measure", choices=["accuracy", "matthews"], default="accuracy", help="what is compared")
    parser.add_argument("--epochs", type=positive, nargs="+", default=[8], help="lengths of training (8)")
    parser.add_argument("--schedule", choices=["constant", "linear"], default="linear", help="of the learning rate")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--r", type=positive, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--curve-texts", type=positive, default=128, help="test texts scored after every epoch")
    parser.add_argument("--generate", action="store_true", help="a decoder answers with the label's name (exact match)")
    parser.add_argument("--landscape", action="store_true", help="measure, and draw, the loss along two directions")
    parser.add_argument("--processes", type=positive, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--results", type=Path, default=Path("results.jsonl"), help="default: %(default)s")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="save training curves and heat maps there")
    parser.add_argument("--report-only", action="store_true", help="make no run; report those in the results file")
    return parser


def after_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--then", nargs="+", choices=list(AFTER), default=[], help="what to measure after training")
    parser.add_argument("--second-file", type=Path, metavar="TSV", help="training texts of add's and sequence's task B")
    parser.add_argument("--second-test-file", type=Path, metavar="TSV", help="its test texts")
    parser.add_argument("--second-steps", type=positive, default=32, help="sequence's on task B (default: %(default)s)")


def parse_arguments(argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The arguments of this script, or of a `parser` for another one, which has no `--then`."""
    if parser is None:
        parser = build_parser(__doc__)
        after_arguments(parser)
    else:
        parser.set_defaults(then=[], second_file=None)
    args = parser.parse_args(argv)
    if args.generate and args.measure == "matthews":
        parser.error("--generate measures exact match; --measure matthews is of classes")
    if any(flip > 1 for flip in args.flip) or not 0 < args.validation < 1:
        parser.error("--flip must be between 0 and 1, --validation strictly so")
    check_after(args, parser)
    return args


def check_after(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """An error for a measure that the other arguments leave nothing to measure."""
    wanted = {*args.then}
    args.then = [name for name in AFTER if name in wanted]
    if "general" in wanted and not args.generate:
        parser.error("--then general measures a language model: it needs --generate and a decoder as --model")
    if "detect" in wanted and 0 in args.flip:
        parser.error("--then detect looks for wrong labels: give --flip a share of them")
    if bool(wanted & {*TWO_TASKS}) != (args.second_file is not None):
        parser.error(f"--then {' and '.join(TWO_TASKS)} need --second-file, a second task, and nothing else takes one")
    if "sequence" in wanted and (args.second_steps % LOOKS or args.second_steps < 2 * LOOKS):
        parser.error(f"--second-steps must be a multiple of {LOOKS} and {2 * LOOKS} or more, got {args.second_steps}")
    others = {text.partition("@")[0].partition(":")[0] for text in args.runs}
    others = {name for name in others if name in METHODS and METHODS[name].adapter != "lora"}
    if "add" in wanted and others:
        parser.error(f"--then add adds LoRA's adapters, as PEFT does; not those of {', '.join(sorted(others))}")


def main() -> None:
    args = parse_arguments()
    quiet()
    with Store(args.results, read_only=args.report_only) as store:
        found: dict[Run, list[Setting]] = {}
        for regime in regimes(args, load_texts(args).name):
            parsed = [setting for text in args.runs for setting in parse_settings(text, args.lr)]
            if args.tune:
                parsed = tuned(regime, list(dict.fromkeys(setting.method for setting in parsed)), store, args)
            wanted = afterwards(regime, args)
            runs = [of(each, setting, seed) for seed in args.seeds for setting in parsed for each in wanted]
            make(runs, store, args, "runs")
            print(f"\n{report(regime, parsed, store, args)}")
            found[regime] = parsed
        if args.pictures is not None:
            draw_grids(found, store, args)
    print(f"\n{NOTE}")


if __name__ == "__main__":
    main()
