"""What a measurement or a bug report must say about the machine: versions, commit, device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import opsin

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "simplejpeg",
    "msgspec",
    "huggingface_hub",
)
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
)


def collect() -> dict[str, Any]:
    """Facts about this machine and installation, by name. Imports torch; reads no secrets."""
    import torch

    facts: dict[str, Any] = {
        "opsin": opsin.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }
    facts["packages"] = {name: _version(name) for name in _PACKAGES}
    facts["environment"] = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return facts


def device_name() -> str:
    """The accelerator that ``device="auto"`` picks, or the processor."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


def driver_version(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The NVIDIA driver's version, such as 580.95.05; None without one, or where the system does not tell."""
    try:
        found = re.search(r"^NVRM version:.*?\s(\d+\.\d[\d.]*)\s", told.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def commit() -> str | None:
    """The commit of the checkout that opsin runs from, with ``-dirty`` if it was edited; None when installed."""
    source = Path(opsin.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):  # some other project's repository around a virtual environment
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def table(facts: Mapping[str, Any], indent: str = "") -> str:
    """The facts as aligned lines."""
    width = max((len(name) for name in facts), default=0)
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", table(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{width}}  {'none' if value is None else value}")
    return "\n".join(line for line in lines if line)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
