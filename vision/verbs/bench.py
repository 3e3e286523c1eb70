"""`polymamba vision bench`: how many images models take in a second on this machine, as a table."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ...core.device import pick_device, uses_bf16
from ...core.errors import InputError
from ...core.files import require_writable
from ...core.speed import cell, cell_mib, cell_ms, describe_machine, save_table, table_line
from ..bench import Speed, create, measure, multiplication_rate
from ..commands import Bench
from ..transforms import data_config
from ..vim import Vim
from .common import load_model

COLUMNS = ("model", "work", "run", "pixels", "median ms", "images/s", "ratio", "peak MiB", "share of limit")
SUCH_AS = ("vim_tiny_patch16_224", "vmamba_tiny_s1l8")


def bench(args: Bench) -> None:
    """Print the machine, then each line as soon as it is measured."""
    if args.output is not None:
        require_writable(args.output)
    for word in args.models:
        if not _is_folder(word) and not timm.is_model(str(word)):
            raise InputError(f"{word}: neither a run folder nor a model of timm's, such as {' or '.join(SUCH_AS)}")
    device = pick_device(args.compute)
    bf16 = uses_bf16(args.compute, device)
    rate = multiplication_rate(device, bf16, args.repeats)
    about: dict[str, Any] = {
        "images in a batch": args.batch_size,
        **describe_machine(device, bf16),
        "products of large matrices, TFLOP/s": round(rate / 1e12, 2),
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    width = max(len(str(word)) for word in args.models) + 2
    print(table_line(COLUMNS, COLUMNS, width), flush=True)
    rows: list[Speed] = []
    for row in _measured(args, bf16, rate):
        rows.append(row)
        print(table_line(COLUMNS, _cells(row, _ratio(rows, row)), width), flush=True)
    if args.output is not None:
        figures = [{"images_per_second": row.images_per_second, "ratio": _ratio(rows, row)} for row in rows]
        lines = [{**asdict(row), **more} for row, more in zip(rows, figures, strict=True)]
        save_table(args.output, about, COLUMNS, [_cells(row, _ratio(rows, row)) for row in rows], lines)


def _measured(args: Bench, bf16: bool, rate: float) -> Iterator[Speed]:
    for word in args.models:
        torch.manual_seed(args.compute.seed)
        model, shape = _model(word, args)
        options: Any = {"bf16": bf16, "compiled": args.compile, "repeats": args.repeats, "rate": rate}
        yield from measure(model, str(word), (args.batch_size, *shape), **options)
        del model  # before the next one takes its place in the device's memory


def _is_folder(word: Path) -> bool:
    return word.exists() or len(word.parts) > 1  # owner/name: of the hub


def _model(word: Path, args: Bench) -> tuple[nn.Module, tuple[int, int, int]]:
    """On the device, and the shape of an image for it."""
    model: Any
    if _is_folder(word):
        model, _ = load_model(word, args.compute)
        channels, *sides = data_config(model)["input_size"]
        if args.size is not None and isinstance(model, Vim):
            model.set_input_size(args.size)
    else:
        model = create(str(word), args.size).to(pick_device(args.compute))
        channels, *sides = model.pretrained_cfg["input_size"]
    height, width = sides if args.size is None else (args.size, args.size)
    return model, (channels, height, width)


def _ratio(rows: list[Speed], row: Speed) -> float | None:
    """Images a second over those of the first line of the same work."""
    first = next(other for other in rows if other.work == row.work).images_per_second
    return row.images_per_second / first if row.images_per_second and first else None


def _cells(row: Speed, ratio: float | None) -> tuple[str, ...]:
    return (
        row.model,
        row.work,
        row.run,
        "x".join(map(str, row.pixels)),
        cell_ms(row.seconds),
        cell(row.images_per_second, ",.1f"),
        cell(ratio, ".2f"),
        cell_mib(row.peak_bytes),
        cell(row.share_of_limit, ".1%"),
    )
