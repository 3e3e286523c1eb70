"""What every result file says of where it was measured."""

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numba", "numpy", "transformers", "mambapy")


def describe() -> list[str]:
    """Lines for the top of a result file: date, commit, machine, versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"date: {datetime.date.today()}   commit: {_commit()}",
        f"machine: {_cpu()}, {torch.get_num_threads()} threads used{''.join(', ' + d for d in devices)}",
        f"versions: Python {platform.python_version()}, {', '.join(f'{k} {v}' for k, v in found.items())}",
    ]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
