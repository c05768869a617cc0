"""What holds for every test: one thread, no network, and GPU tests only where there is a GPU."""

import atexit
import os
import shutil
import tempfile

# Tests leave nothing in the user's own cache.
os.environ.setdefault(
    "PLAYWRIGHT_BROWSERS_PATH",
    os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ms-playwright"),
)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="opsin-tests-")

# Read when torch, tokenizers, huggingface_hub and triton are first imported, so before any test module is.
os.environ["OMP_NUM_THREADS"] = "1"  # spinning OpenMP threads turn milliseconds into seconds on a busy machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"  # no NVIDIA driver: kernels run in Triton's interpreter

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.factory import LlavaShape


atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # here only: tests of the policy rooms must not pay for it

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[LlavaShape], Path]":
    """Folders of tiny random LLaVA checkpoints by shape, each written once a session."""
    from tests.factory import session_folder  # imports torch and transformers

    return session_folder(tmp_path_factory.mktemp("llava"))
