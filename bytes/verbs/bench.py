"""`polymamba bytes bench`: what a model does in a second on this machine, as a table."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from ...core.config import ComputeConfig
from ...core.device import autocast, pick_device, uses_bf16
from ...core.errors import InputError
from ...core.files import require_writable
from ...core.speed import cell, cell_mib, cell_ms, describe_machine, save_table, table_line
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
        **describe_machine(device, bf16),
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
    if args.output is not None:
        lines = [{**asdict(row), "bytes_per_second": row.bytes_per_second} for row in rows]
        save_table(args.output, about, COLUMNS, list(map(_cells, rows)), lines)


def _model(word: Path, compute: ComputeConfig) -> ByteLM:
    """That of the run folder, or one of the preset's size with random weights."""
    name = str(word)
    if word.exists() or len(word.parts) > 1:  # owner/name: of the hub
        return load_model(word, compute)
    if name not in PRESETS:
        raise InputError(f"{name}: neither a run folder nor a preset ({', '.join(PRESETS)})")
    return ByteLM(preset_config(cast(Preset, name))).to(pick_device(compute))


def _cells(row: Speed) -> tuple[str, ...]:
    return (
        row.work,
        f"{row.batch:,}",
        f"{row.length:,}",
        cell_ms(row.seconds),
        cell(row.bytes_per_second, ",.0f"),
        cell_mib(row.peak_bytes),
        cell(row.share_of_limit, ".1%"),
    )


def _line(cells: tuple[str, ...]) -> str:
    return table_line(COLUMNS, cells, 10)
