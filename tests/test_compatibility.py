"""The table of what was tested with what, and the reports that it is made of."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import compatibility
import conftest
import pytest
from compatibility import METHODS, PAGE, ROWS, Report, table, written

CASE = '<testcase classname="tests.every_method.test_method_{file}" name="{name}[{method}]">{inside}</testcase>'


def report(tmp_path, name, *cases, version="1.0"):
    version = f'<properties><property name="torch" value="{version}"/></properties>'
    rest = [CASE.format(file="other", name="test_first", method="", inside=version)]
    path = tmp_path / f"{name}.xml"
    path.write_text(f"<testsuites><testsuite>{''.join([*cases, *rest])}</testsuite></testsuites>")
    return Report.read(path)


def case(inside="", method="GGPO gaussian", name="test_x_ddp"):
    return CASE.format(file="distributed", name=name, method=method, inside=inside)


@pytest.fixture
def one_row(monkeypatch):
    monkeypatch.setattr(compatibility, "ROWS", {"DDP": ROWS["DDP (two processes)"]})


SKIPPED, FAILED = '<skipped type="pytest.skip"/>', "<failure/>"
REFUSED = '<properties><property name="refused" value="by name"/></properties>'


@pytest.mark.parametrize(
    ("oldest", "newest", "shown"),
    [
        ([case()], [case()], "✓"),
        ([case(SKIPPED)], [case()], "◐"),
        ([case()], [], "◑"),
        ([case(SKIPPED)], [case(SKIPPED)], "–"),
        ([case(REFUSED)], [case(REFUSED)], "✗"),
        ([case(), case(FAILED, name="test_y_ddp")], [case()], "**fails**"),
        ([case()], [case('<skipped type="pytest.xfail"/>')], "**fails**"),
        ([case(method="GraLoRA under GGPO")], [case(method="GraLoRA under GGPO")], "–"),
    ],
)
def test_a_cell_is_what_both_reports_say_of_the_method(one_row, tmp_path, oldest, newest, shown):
    other = case(method="Bi-LoRA")
    found = table(report(tmp_path, "a", *oldest, other), report(tmp_path, "b", *newest, other, version="2.0"))
    row = next(line for line in found.splitlines() if line.startswith("| DDP"))
    cells = dict(zip(METHODS, [part.strip() for part in row.split("|")[2:-1]], strict=True))
    assert cells["GGPO"] == shown and cells["Bi-LoRA"] == "✓" and cells["BiDoRA"] == "–"
    assert "torch 1.0 and 2.0" in found


def test_a_row_without_a_test_is_no_row(one_row, tmp_path):
    with pytest.raises(SystemExit, match="no test in the reports"):
        table(report(tmp_path, "a"), report(tmp_path, "b"))


def test_the_pages_table_has_all_rows_and_is_replaced_in_place():
    text = PAGE.read_text(encoding="utf-8")
    inside = text.split(compatibility.BEGIN)[1].split(compatibility.END)[0]
    assert [line.split("|")[1].strip() for line in inside.splitlines() if line.startswith("|")][2:] == list(ROWS)
    assert written(text, inside.strip("\n")) == text
    assert written(written(text, "other"), inside.strip("\n")) == text


def test_versions_are_in_the_report_of_a_parallel_run(tmp_path):
    """Written by the hook of this conftest.py, without what else it imports."""
    hook = inspect.getsource(conftest.pytest_collection_modifyitems)
    imports = "import contextlib\nimport importlib.metadata\nimport pytest\nfrom compatibility import PACKAGES\n"
    (tmp_path / "conftest.py").write_text(imports + hook)
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): ...")
    path = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-n", "1", f"--junitxml={path}", "-o", "junit_family=xunit1"]
    command += ["-o", f"pythonpath={Path(__file__).parent}", f"--rootdir={tmp_path}", "test_nothing.py"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert Report.read(path).versions["torch"] == importlib.metadata.version("torch")
