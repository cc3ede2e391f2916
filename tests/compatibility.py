"""Which method is tested in which surroundings: a Markdown table out of pytest's reports.

    pytest --junitxml newest.xml -o junit_family=xunit1    # in one environment, and then in others
    python tests/compatibility.py oldest.xml newest.xml    # the first is the oldest

A row is a list of test files (or parts of the names of tests), a column a method. A test counts for a method whose name
stands in its name: in brackets, as `every_method` writes it, or as a word that is known for it. A cell tells how many
tests passed in every environment in which they were run; a failure anywhere is shown as such.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

# By row: what a test's "file::name" must match. A further kind of surroundings gets a line here.
ROWS = {
    "a training loop; resumed to the bit": r"test_method_(laws|states|resume)",
    "copies, removal, successors": r"test_method_lifetimes",
    "transformers' Trainer": r"test_method_trainer|test_trainer",
    "TRL": r"test_trl",
    "Lightning": r"test_lightning",
    "DDP (two processes)": r"test_method_distributed.*ddp",
    "FSDP2 (two processes)": r"test_method_distributed.*fsdp",
    "8-bit and paged optimizers": r"(bitsandbytes|test_cuda).*(8bit|8_bit)",
    "NF4 base": r"nf4",
    "int8 base": r"int8",
    "16-bit autocast, GradScaler": r"test_cuda.*scaler",
    "torch.compile": r"compil",
    "gradient checkpointing": r"recomput|checkpointed",
    "meta device, operators counted": r"test_meta",
}
# By column: what must match the rest, where longer names are looked for first.
METHODS = {
    "GGPO": r"GGPO gaussian|GGPO low_rank|ggpo",
    "Bi-LoRA": r"Bi-LoRA|bilora",
    "LoRASAM": r"LoRASAM|lorasam",
    "BiDoRA": r"BiDoRA|bidora",
    "GraLoRA": r"GraLoRA(?! under)|gralora",
    "GraLoRA under GGPO": r"GraLoRA under GGPO",
}
OUTCOMES = ("failure", "error", "skipped")


def outcomes(report: Path) -> dict[str, str]:
    """By the name of each test: "passed", "failure", "error", "skipped" or "xfail"."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        child = next((child for child in case if child.tag in OUTCOMES), None)
        outcome = "passed" if child is None else child.tag
        if child is not None and child.get("type") == "pytest.xfail":
            outcome = "xfail"
        found[f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}"] = outcome
    return found


def cell(tests: list[str], reports: list[dict[str, str]]) -> str:
    counts = Counter(report[test] for report in reports for test in tests if test in report)
    if failed := counts["failure"] + counts["error"]:
        return f"**{failed} failed**"
    passed = sum(any(report.get(test) == "passed" for report in reports) for test in tests)
    known = {test for test in tests if any(report.get(test) == "xfail" for report in reports)}
    return (f"{passed}" if passed else "not tested") + (f" ({len(known)} known to fail)" if known else "")


def table(reports: list[dict[str, str]]) -> str:
    """Rows of surroundings, columns of methods, cells of how many tests passed."""
    tests = sorted(set().union(*reports))
    lines = ["| | " + " | ".join(METHODS) + " |", "| --- " * (len(METHODS) + 1) + "|"]
    for row, pattern in ROWS.items():
        of_row = [test for test in tests if re.search(pattern, test)]
        if not of_row:
            raise SystemExit(f"no test in the reports matches {pattern!r} of the row {row!r}; mend ROWS in {__file__}")
        cells = [cell([t for t in of_row if re.search(method, t)], reports) for method in METHODS.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions(report: Path) -> str:
    """What `conftest.py` wrote into the report of the packages that were installed."""
    properties = ElementTree.parse(report).iter("property")
    return ", ".join(f"{p.get('name')} {p.get('value')}" for p in properties if p.get("name") in PACKAGES)


PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "lightning", "bitsandbytes")

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    paths = [Path(name) for name in sys.argv[1:]]
    print(table([outcomes(path) for path in paths]))
    print("\nTests that passed, on " + "; and on ".join(versions(path) for path in paths) + ".")
