"""Every fault in the table has its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS.parent / "docs" / "faults.md"


class Fault(NamedTuple):
    """One row: its number, and the tests that it names."""

    number: int
    tests: list[str]


def faults() -> list[Fault]:
    rows = re.findall(r"^\| (\d+) \|(?:[^|]*\|){3} ([^|]+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return [Fault(int(number), re.findall(r"`([^`]+)`", cell)) for number, cell in rows]


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_faults_are_numbered_without_a_gap():
    assert [fault.number for fault in faults()] == list(range(1, 83))


def test_faults_name_tests_that_there_are():
    missing: list[str] = []
    for test in {test for fault in faults() for test in fault.tests}:
        file, _, name = test.partition("::")
        if not name.startswith("test_") or not (TESTS / file).is_file() or name not in names_in(TESTS / file):
            missing.append(test)
    assert missing == []


def test_faults_all_have_a_test():
    assert [fault.number for fault in faults() if not fault.tests] == []
