"""What each method was tested with: examples/compatibility.md, out of pytest's reports.

    PYTEST_ADDOPTS="--junitxml=oldest.xml -o junit_family=xunit1" pytest -n 2    # with the oldest versions installed
    PYTEST_ADDOPTS="--junitxml=newest.xml -o junit_family=xunit1" pytest -n 2    # with the newest
    python tests/compatibility.py oldest.xml newest.xml             # prints the table
    python tests/compatibility.py --write oldest.xml newest.xml     # and puts it into examples/compatibility.md

A row is a pattern of tests' names, a column a method. A test counts for a method whose name stands in its own: in
brackets, as `every_method` writes it, or as a word that is known for it.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

# By row: what a test's "file::name" must match. A further kind of surroundings gets a line here.
ROWS = {
    "a loop of your own, with accumulation": r"test_method_laws.*micro_batches",
    "resumed in a new process, to the bit": r"test_method_resume",
    "gradient checkpointing": r"test_method_laws.*recomputation",
    "`torch.compile`, one graph": r"test_compile.*one_graph",
    "transformers' `Trainer`": r"test_method_trainer",
    "`Trainer` and TRL's SFT on a 4-bit or 8-bit model": r"test_gralora_trainer",
    "TRL: SFT": r"test_trl.*sft",
    "TRL: DPO, GRPO": r"test_trl.*(dpo|grpo)",
    "sentence-transformers": r"test_sentence",
    "sentence-transformers, cached losses": r"test_sentence.*cached_loss",
    "Lightning": r"test_lightning.*a_fit_is_the_loop",
    "Lightning Fabric": r"test_bypass.*reach_the_optimizer_within.*Fabric",
    "Accelerate": r"test_method_accelerate.*one_process",
    "Accelerate's FSDP2 (two processes)": r"test_method_accelerate.*fsdp2",
    "DDP (two processes)": r"test_method_distributed.*ddp",
    "FSDP2 (two processes)": r"test_method_distributed.*fsdp",
    "DeepSpeed, ZeRO stage 0 (two processes)": r"test_method_deepspeed.*one_does",
    "`torch.distributed.checkpoint`": r"test_method_checkpoint.*goes_on",
    "hooks of Accelerate's on the layers": r"test_bypass.*others_patched",
    "pytorch_optimizer's `Lookahead` and `ScheduleFreeWrapper`": r"test_base_states(?!.*(dtype|metrics))",
    "8-bit and paged optimizers": r"test_method_bitsandbytes.*8bit",
    "NF4 base": r"test_method_bitsandbytes.*nf4",
    "int8 base": r"test_method_bitsandbytes.*int8",
}
# By column: what must match.
METHODS = {
    "GGPO": r"(?<!under )GGPO|ggpo|gaussian|low_rank",
    "Bi-LoRA": r"Bi-LoRA|BiLoRA|bilora",
    "LoRASAM": r"LoRASAM|lorasam",
    "BiDoRA": r"BiDoRA|bidora",
    "GraLoRA": r"GraLoRA|gralora|hybrid",
}
LEGEND = (
    "✓ passed with the oldest and the newest versions, ◐ with the newest, skipped or left out with the oldest, "
    "◑ the other way round, ✗ refused by name, – not tested; GraLoRA alone or under GGPO"
)
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "sentence-transformers",
    "lightning",
    "deepspeed",
    "bitsandbytes",
)
PAGE = Path(__file__).parent.parent / "examples" / "compatibility.md"
BEGIN, END = "<!-- compatibility -->", "<!-- /compatibility -->"


@dataclass(frozen=True)
class Report:
    """A run of the tests.

    Attributes:
        outcomes: by the name of each test: "passed", "refused", "failed", "skipped" or "xfail".
        versions: of the packages, as `conftest.py` wrote them into a test's properties.
    """

    outcomes: dict[str, str]
    versions: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Report:
        root = ElementTree.parse(path)
        cases = list(root.iter("testcase"))
        properties = [(p.get("name", ""), p.get("value", "")) for p in root.iter("property")]
        names = [f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}" for case in cases]
        outcomes = dict(zip(names, map(outcome, cases), strict=True))
        return cls(outcomes, {name: value for name, value in properties if name in PACKAGES})

    def of(self, row: str, method: str) -> str:
        """The outcome of all that is tested of a method in surroundings; "skipped" if nothing is."""
        found = [o for test, o in self.outcomes.items() if re.search(row, test) and re.search(method, test)]
        # One that failed, or is known to, is told of whatever the others did.
        return next((o for o in ("failed", "xfail", "passed", "refused") if o in found), "skipped")


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    if (skipped := case.find("skipped")) is not None:
        return "xfail" if skipped.get("type") == "pytest.xfail" else "skipped"
    return "refused" if any(p.get("name") == "refused" for p in case.iter("property")) else "passed"


def cell(oldest: str, newest: str) -> str:
    both = oldest, newest
    if "failed" in both or "xfail" in both:
        return "**fails**"
    if "refused" in both:
        return "✗"
    return {(True, True): "✓", (False, True): "◐", (True, False): "◑"}.get(tuple(o == "passed" for o in both), "–")


def table(oldest: Report, newest: Report) -> str:
    """Rows of surroundings, columns of methods."""
    lines = ["| | " + " | ".join(METHODS) + " |", "| --- " * (len(METHODS) + 1) + "|"]
    for row, pattern in ROWS.items():
        if not any(re.search(pattern, test) for report in (oldest, newest) for test in report.outcomes):
            raise SystemExit(f"no test in the reports matches {pattern!r} of the row {row!r}; mend ROWS in {__file__}")
        cells = [cell(oldest.of(pattern, method), newest.of(pattern, method)) for method in METHODS.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    versions = [
        f"{package} {oldest.versions.get(package, 'none')} and {newest.versions.get(package, 'none')}"
        for package in PACKAGES
        if package in oldest.versions or package in newest.versions
    ]
    return "\n".join([*lines, "", f"{LEGEND}.\n\nOldest and newest: {', '.join(versions)}."])


def written(text: str, new: str) -> str:
    """`text` with `new` between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{PAGE.name} must have {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:] if argument != "--write"]
    if len(paths) != 2:
        raise SystemExit(__doc__)
    found = table(*map(Report.read, paths))
    print(found)
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
