"""`polymamba bytes bench`: what a model does in a second on this machine, as a table."""

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from ...core.config import ComputeConfig
from ...core.errors import InputError
from ...core.files import require_writable, write_json, write_text
from ...core.train import autocast, pick_device, uses_bf16
from ..bench import Speed, measure
from ..commands import Bench
from ..config import PRESETS, Preset, preset_config
from ..model import ByteLM
from .common import load_model

COLUMNS = ("work", "sequences", "bytes each", "median ms", "bytes/s", "peak MiB", "share of limit")


def bench(args: Bench) -> None:
    """Print the machine, then each line as soon as it is measured."""
    if args.output is not None:
        require_writable(args.output)
    device = pick_device(args.compute)
    torch.manual_seed(args.compute.seed)
    model = _model(args.model, args.compute).eval()
    bf16 = uses_bf16(args.compute, device)
    about: dict[str, Any] = {
        "model": str(args.model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": "bf16" if bf16 else "fp32",
        "device": _name(device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    rows: list[Speed] = []
    with autocast(args.compute):
        results = measure(
            model,
            training=(args.batch_size, args.context),
            prompt=args.prompt_bytes,
            batches=args.decode_batches,
            bf16=bf16,
            repeats=args.repeats,
        )
        for result in results:
            if isinstance(result, Speed):
                rows.append(result)
                print(_line(_cells(result)), flush=True)
            else:
                about["copy bandwidth, GB/s"] = round(result / 1e9, 1)
                print("\n".join(f"{name}: {value}" for name, value in about.items()))
                print(_line(COLUMNS), flush=True)
    if args.output is None:
        return
    if args.output.suffix == ".json":
        lines = [{**asdict(row), "bytes_per_second": row.bytes_per_second} for row in rows]
        write_json(args.output, {**about, "rows": lines})
    else:
        table = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, rows)]
        head = [f"{name}: {value}" + "  " for name, value in about.items()]  # two spaces end a line in Markdown
        write_text(args.output, "\n".join([*head, "", *(f"| {' | '.join(row)} |" for row in table)]) + "\n")


def _model(word: Path, compute: ComputeConfig) -> ByteLM:
    """That of the run folder, or one of the preset's size with random weights."""
    name = str(word)
    if word.exists() or len(word.parts) > 1:  # owner/name: of the hub
        return load_model(word, compute)
    if name not in PRESETS:
        raise InputError(f"{name}: neither a run folder nor a preset ({', '.join(PRESETS)})")
    return ByteLM(preset_config(cast(Preset, name))).to(pick_device(compute))


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {torch.get_num_threads()} threads"


def _cells(row: Speed) -> tuple[str, ...]:
    def text(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    took = "no memory" if row.seconds is None else f"{1e3 * row.seconds:,.2f}"
    memory = text(None if row.peak_bytes is None else row.peak_bytes / 2**20, ",.0f")
    share = text(row.share_of_limit, ".1%")
    return row.work, f"{row.batch:,}", f"{row.length:,}", took, text(row.bytes_per_second, ",.0f"), memory, share


def _line(cells: tuple[str, ...]) -> str:
    return f"{cells[0]:<10}" + "".join(f"{cell:>16}" for cell in cells[1:])
