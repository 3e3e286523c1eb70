"""What the `bench` verbs share: a step of training, medians, peaks of memory, the name of a device, and their table."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import write_json, write_text
from .optim import averaged, parameter_groups


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int, warm_ups: int = 1) -> float:
    """Of `repeats` times, after `warm_ups` that are not counted."""
    times = []
    for _ in range(warm_ups + repeats):
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_ups:])


def training_step(model: nn.Module, backward: Callable[[], object]) -> Callable[[], None]:
    """A whole step of the training loop (train.py), short of reading data, around what makes the gradients.

    The weights stay as they are: the learning rate is 0.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.0, betas=(0.9, 0.95))
    average = averaged(model, 0.99)

    def step() -> None:
        backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)

    return step


def with_peak(work: Callable[[], float], device: torch.device) -> tuple[float | None, int | None]:
    """What `work` returns, None if the device's memory is too small, and the most memory in use meanwhile, in bytes.

    On a CPU that is the process's; None where it cannot be told.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        _reset_peak_of_process()
    try:
        seconds = work()
    except torch.OutOfMemoryError:
        seconds = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
        return seconds, peak
    return seconds, _peak_of_process() if device.type == "cpu" else None


def _reset_peak_of_process() -> None:
    """On Linux; elsewhere, or where that is not allowed, `_peak_of_process` is that since the process began."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_of_process() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def describe_machine(device: torch.device, bf16: bool) -> dict[str, str]:
    """What every table says of where it was measured: precision, device, versions."""
    return {
        "precision": "bf16" if bf16 else "fp32",
        "device": _name(device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {torch.get_num_threads()} threads"


def cell(value: float | None, form: str) -> str:
    """A figure as a cell of the table: "-" where there is none."""
    return "-" if value is None else f"{value:{form}}"


def cell_ms(seconds: float | None) -> str:
    """Seconds as milliseconds; None is what did not fit into memory."""
    return "no memory" if seconds is None else f"{1e3 * seconds:,.2f}"


def cell_mib(n_bytes: int | None) -> str:
    return cell(None if n_bytes is None else n_bytes / 2**20, ",.0f")


def table_line(columns: Sequence[str], cells: Sequence[str], first: int) -> str:
    """A line for the terminal: the first column `first` characters wide, the others as wide as their heads need."""
    rest = (f"{text:>{max(len(column), 9) + 2}}" for column, text in zip(columns[1:], cells[1:], strict=True))
    return f"{cells[0]:<{first}}" + "".join(rest)


def save_table(
    path: Path,
    about: dict[str, Any],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Write `about` and the table: as .json the `rows`, else their `cells` as Markdown."""
    if path.suffix == ".json":
        write_json(path, {**about, "rows": list(rows)})
        return
    head = [f"{name}: {value}" + "  " for name, value in about.items()]  # two spaces end a line in Markdown
    table = [columns, ("---",) * len(columns), *cells]
    write_text(path, "\n".join([*head, "", *(f"| {' | '.join(row)} |" for row in table)]) + "\n")
