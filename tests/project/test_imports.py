"""What importing costs: policy, media workers and the package itself start without torch and transformers."""

import pkgutil
import subprocess
import sys

import pytest

import opsin

# Imports the modules named as arguments in turn, and prints those that brought torch or transformers with them.
_PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    before = {"torch", "transformers"} & set(sys.modules)
    importlib.import_module(name)
    if {"torch", "transformers"} & set(sys.modules) != before:
        print(name)
"""


def torch_free_modules() -> list[str]:
    """Every module that promises to import neither torch nor transformers."""
    names = ["opsin", "opsin.config", "opsin.errors", "opsin.models", "opsin.params", "opsin.types", "opsin.cli.main"]
    for module in pkgutil.walk_packages(opsin.__path__, "opsin."):
        in_policy = f"{module.name}.".startswith(("opsin.scheduler.", "opsin.cache.", "opsin.media."))
        is_rule = module.name.startswith("opsin.models.") and module.name.endswith(".rule")
        if in_policy or is_rule:
            names.append(module.name)
    return names


def offenders(modules: list[str]) -> list[str]:
    """The modules whose import loads torch or transformers, in a fresh interpreter."""
    command = [sys.executable, "-c", _PROBE, *modules]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_import_of_torch_free_modules_loads_no_torch() -> None:
    modules = torch_free_modules()
    assert {"opsin.media", "opsin.scheduler.scheduler", "opsin.models.llava.rule"} <= set(modules)
    assert offenders(modules) == []


def test_import_probe_names_the_module_that_loads_torch() -> None:
    assert offenders(["opsin.types", "opsin.kernels.inputs"]) == ["opsin.kernels.inputs"]


def test_public_names_resolve_and_are_listed() -> None:
    for name in opsin.__all__:
        assert getattr(opsin, name) is not None
    assert sorted(opsin.__all__) == dir(opsin)


def test_unknown_public_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = opsin.Nonsense  # type: ignore[attr-defined]
