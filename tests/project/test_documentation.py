"""The documents say what is so: code in them runs, the command reference is current, every error code is explained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from opsin import errors
from opsin.cli.main import build_parser
from opsin.models import MODELS
from scripts.cli_reference import reference
from scripts.models_reference import reference as models_reference

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced piece of Python; ``runs`` unless its fence says ``no-run``."""

    line: int
    code: str
    runs: bool


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        attributes = match[1].split()
        assert set(attributes) <= {"no-run"}, f"{document.name}: unknown fence attribute in {match[1]!r}"
        yield Block(text.count("\n", 0, match.start(2)) + 1, match[2], not attributes)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(blocks(d))], ids=lambda path: path.name)
def test_python_in_document_runs(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {"__name__": f"document_{document.stem}"}
    for block in blocks(document):
        padded = "\n" * (block.line - 1) + block.code  # tracebacks then name the document's own lines
        code = compile(padded, str(document), "exec")
        if block.runs:
            exec(code, namespace)


def test_quickstart_example_answers_truly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    script = ROOT / "examples" / "quickstart.py"
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {"__name__": "__main__"})
    count, color, relation = capsys.readouterr().out.lower().splitlines()
    assert "2" in count.partition("?")[2]
    assert "red" in color.partition("?")[2]
    assert "blue" in relation.partition("?")[2]


def test_command_reference_is_current() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(build_parser()), "docs/cli.md is stale: run 'make docs'"


def test_table_of_models_is_current() -> None:
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == models_reference(), "docs/models.md is stale: run 'make docs'"
    for family in MODELS:
        assert f"| `{family.name}` |" in written


def codes_in_source() -> set[str]:
    """Every string given as ``code=`` to a call in the package."""
    codes: set[str] = set()
    for path in (ROOT / "src" / "opsin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                if isinstance(node.value.value, str):
                    codes.add(node.value.value)
    return codes


def test_every_error_code_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([a-z0-9_]+)` \|", text, re.MULTILINE))
    assert len(codes_in_source()) > 5
    assert documented == codes_in_source()


def test_every_error_class_is_documented() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert [name for name in classes if f"`{name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_family_folders_are_as_short_as_the_guide_says() -> None:
    guide = (ROOT / "docs/add-a-model.md").read_text(encoding="utf-8")
    match = re.search(r"A\s+family's folder is (\d+) lines at the most", guide)
    assert match is not None
    lengths = {
        rule.parent.name: sum(len(path.read_text(encoding="utf-8").splitlines()) for path in rule.parent.glob("*.py"))
        for rule in (ROOT / "src/opsin/models").glob("*/rule.py")
    }
    assert len(lengths) > 10
    assert {name: length for name, length in lengths.items() if length > int(match[1])} == {}
