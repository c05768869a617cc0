from __future__ import annotations

from pathlib import Path

import pytest

from opsin.cli import environment


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\nGCC version: 12.2",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 13.3.0",
            "580.95.05",
        ),
        ("something else 1.2.3 ", None),
    ],
)
def test_driver_is_told_as_the_kernel_module_names_itself(told: str, expected: str | None, tmp_path: Path):
    (tmp_path / "version").write_text(told)
    assert environment.driver_version(tmp_path / "version") == expected
    assert environment.driver_version(tmp_path / "absent") is None


def test_facts_name_what_a_measurement_must_say():
    facts = environment.collect()
    assert {"opsin", "commit", "python", "device", "cuda", "driver", "packages"} <= facts.keys()
    assert environment.table(facts)
