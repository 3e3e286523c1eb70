"""Vim and VMamba against timm's DeiT, Swin, ConvNeXt and MambaOut: images a second and memory, by size of the image.

    python benchmarks/vision.py [--output benchmarks/results/vision_speed.md] [--limit 270]

The steps are those of `polymamba vision bench`, but for training's optimizer. Random weights and images, bf16: weights
in bf16 for the forward, autocast for training (forward, cross-entropy, backward). Batch 128 at 224 pixels; at larger
sizes as many images as hold about as many pixels, or --times as many: few images do not fill a GPU. Medians of
--repeats after 3 that warm up. Memory is the most allocated during the runs. Graphed: the same kernels, launched as one
CUDA graph (core/replayed.py), as `vision train --cuda-graph` and `vision predict` do. Compiled: in mode
reduce-overhead, which replays CUDA graphs, too. timm's models have SDPA attention where they have attention. Rows come
in the order of their weight; what --limit seconds do not allow is left out and said so. On a CPU: --device cpu
--models test_vim,deit_tiny_patch16_224 --batch 2 --sizes 96
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from machine import describe

from polymamba.core.replayed import Replayed, own_stream
from polymamba.core.speed import median_seconds, with_peak
from polymamba.vision.bench import backward_step, create, forward_step

MODELS = {  # timm's name -> ours in the table
    "vmamba_tiny_s1l8": "**VMamba-T s1l8**",
    "vim_tiny_patch16_224": "**Vim-Ti**",
    "vim_small_patch16_224": "**Vim-S**",
    "deit_tiny_patch16_224": "DeiT-Ti",
    "deit_small_patch16_224": "DeiT-S",
    "swin_tiny_patch4_window7_224": "Swin-T",
    "convnext_tiny": "ConvNeXt-T",
    "mambaout_tiny": "MambaOut-T",
}
AT_LARGER = ("vim_tiny_patch16_224", "deit_tiny_patch16_224", "vmamba_tiny_s1l8", "convnext_tiny")
Cell = tuple[float, float] | str  # images/s and peak GiB (NaN on a CPU), or why not
Rows = dict[tuple[str, int, str], Cell]  # (model, size, kind) ->
WARM_UPS = 3
KINDS = ("forward", "training", "graphed forward", "graphed training", "compiled forward")


def measure(name: str, size: int, batch: int, kind: str, device: torch.device, repeats: int) -> Cell:
    """Of a line of the plan."""
    training = kind.endswith("training")
    graphed = kind.startswith("graphed")
    dtype = torch.float32 if training else torch.bfloat16

    def work() -> float:
        torch.manual_seed(0)
        model = create(name, None if size == 224 else size).to(device, dtype).train(training)
        images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        if training:
            labels = torch.randint(model.num_classes, (batch,), device=device)
            backward = backward_step(model, images, labels, bf16=True)
            if graphed:
                return by_graph(lambda: (model.zero_grad(), backward()), device, repeats)
            return median_seconds(lambda: (backward(), model.zero_grad()), device, repeats, WARM_UPS)
        compiled = kind.startswith("compiled")
        forward = forward_step(torch.compile(model, mode="reduce-overhead") if compiled else model, images)
        assert forward().isfinite().all(), f"{name} at {size}: not finite"
        return by_graph(forward, device, repeats) if graphed else median_seconds(forward, device, repeats, WARM_UPS)

    seconds, peak = with_peak(work, device)
    torch.compiler.reset()
    if seconds is None:
        return "no memory"
    return batch / seconds, peak / 2**30 if device.type == "cuda" else float("nan")


def by_graph(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a step that is recorded."""
    replayed = Replayed(lambda _: step(), device)
    with own_stream(device):
        return median_seconds(lambda: replayed(()), device, repeats, WARM_UPS)


def plan(models: list[str], sizes: list[int]) -> list[tuple[str, int, str]]:
    """What to measure, the most wanted first."""
    at_224 = [(name, 224, kind) for kind in KINDS[:-1] for name in models]
    larger = [
        (name, size, "graphed forward") for size in sizes for name in models if name in AT_LARGER or len(models) < 4
    ]
    return at_224 + larger + [(name, 224, "compiled forward") for name in models]


def table(rows: Rows, sizes: dict[int, int], models: list[str]) -> list[str]:
    """sizes: and the batch of each."""

    def cell(row: Cell | None) -> str:
        if row is None:
            return "not measured"
        return row if isinstance(row, str) else f"{row[0]:,.0f} ({row[1]:.2f})"

    lines = ["", "## 224 pixels", "", f"| | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for name in models:
        cells = [cell(rows.get((name, 224, kind))) for kind in KINDS]
        lines.append(f"| {MODELS.get(name, name)} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Graphed forward, larger images",
        "",
        f"| | {' | '.join(f'{size}, batch {batch}' for size, batch in sizes.items())} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name in models:
        if any((name, size, "graphed forward") in rows for size in sizes):
            cells = [cell(rows.get((name, size, "graphed forward"))) for size in sizes]
            lines.append(f"| {MODELS.get(name, name)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=float, default=270, help="seconds after which nothing new is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sizes", default="1248,2048,512,1024")
    parser.add_argument("--batch", type=int, default=128, help="at 224 pixels")
    parser.add_argument(
        "--times", type=float, default=1, help="at larger sizes, as many times the pixels of a batch at 224"
    )
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    began, models, sizes = time.monotonic(), args.models.split(","), [int(s) for s in args.sizes.split(",") if s]
    rows: Rows = {}
    for name, size, kind in plan(models, sizes):
        if time.monotonic() - began > args.limit:
            continue
        batch = batch_at(size, args.batch, args.times)
        rows[name, size, kind] = measure(name, size, batch, kind, torch.device(args.device), args.repeats)
        took = f"{time.monotonic() - began:.0f} s"
        print(name, size, kind, rows[name, size, kind], took, file=sys.stderr, flush=True)
        if args.output:
            args.output.write_text(report(rows, sizes, models, args.batch, args.times))  # a compilation may be long
    print(report(rows, sizes, models, args.batch, args.times))


def batch_at(size: int, batch: int, times: float) -> int:
    return max(1, round(batch * (224 / size) ** 2 * (1 if size == 224 else times)))


def report(rows: Rows, sizes: list[int], models: list[str], batch: int, times: float) -> str:
    head = [
        "# Vision models: images a second (peak GiB)",
        "",
        *(line + "  " for line in describe()),
        f"timm {timm.__version__}; bf16, batch {batch} at 224 pixels, elsewhere as it says",
    ]
    return "\n".join([*head, *table(rows, {n: batch_at(n, batch, times) for n in sorted(sizes)}, models)]) + "\n"


if __name__ == "__main__":
    main()
