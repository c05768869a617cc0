"""What importing costs: policy, media workers and the package itself start without torch and transformers."""

import pkgutil
import subprocess
import sys

import pytest

import opsin

TORCH_FREE_ROOTS = ("opsin.cache", "opsin.cli.main", "opsin.media", "opsin.models", "opsin.scheduler")


def torch_free_modules() -> list[str]:
    """Every module that promises to import neither torch nor transformers."""
    names = ["opsin", "opsin.config", "opsin.errors", "opsin.params", "opsin.types", *TORCH_FREE_ROOTS]
    for module in pkgutil.walk_packages(opsin.__path__, "opsin."):
        in_policy = module.name.startswith(("opsin.scheduler.", "opsin.cache.", "opsin.media."))
        is_rule = module.name.startswith("opsin.models.") and module.name.endswith(".rule")
        if in_policy or is_rule:
            names.append(module.name)
    return names


def imports_of(module: str) -> set[str]:
    """Top-level packages loaded by importing ``module`` alone in a fresh interpreter."""
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", torch_free_modules())
def test_import_of_torch_free_module_loads_no_torch(module: str) -> None:
    assert not imports_of(module) & {"torch", "transformers"}


def test_import_probe_sees_torch_where_it_is_imported() -> None:
    assert "torch" in imports_of("opsin.kernels.inputs")


def test_public_names_resolve_and_are_listed() -> None:
    for name in opsin.__all__:
        assert getattr(opsin, name) is not None
    assert sorted(opsin.__all__) == dir(opsin)


def test_unknown_public_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = opsin.Nonsense  # type: ignore[attr-defined]
