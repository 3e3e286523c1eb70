"""Caduceus on one GPU: a training step of one strand (Ph) and of both (PS), in time and memory.

    python benchmarks/caduceus.py [1024 131072 524288 1048576] [--output FILE.md]

The published model of 7.7 million parameters (d_model 256, 16 layers), random weights, bf16: forward, loss of hidden
bases, backward, AdamW; the median of 5 steps after one, with checkpointing of 3. PS reads each base twice; "PS against
two of Ph" is its time over that of Ph with twice the batch (at 2^20 bases: over twice the time of Ph). With
checkpointing PS runs the strands one after the other.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import describe

from polymamba.core import BackboneConfig
from polymamba.genomics import Caduceus, CaduceusConfig
from polymamba.genomics.alphabet import MASK, A, T

REPEATS = 5
BACKBONE = BackboneConfig(d_model=256, n_layer=16, pattern=("bimamba",))
LENGTHS = ((1 << 10, 128, False), (1 << 17, 1, False), (1 << 19, 1, True), (1 << 20, 1, True))  # batch; checkpointing


class Step(NamedTuple):
    seconds: float
    peak: float  # GiB


def measure(length: int, batch: int, *, rcps: bool, checkpointing: bool) -> Step | None:
    """A step; None if it does not fit into the GPU's memory."""
    torch.manual_seed(0)
    model = Caduceus(CaduceusConfig(backbone=BACKBONE, rcps=rcps)).cuda().train()
    model.backbone.gradient_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(A, T + 1, (batch, length), device="cuda")
    hidden = torch.rand(tokens.shape, device="cuda") < 0.15

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens.masked_fill(hidden, MASK))
            nats = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
            loss = (nats * hidden).sum() / hidden.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step()
        times = []
        for _ in range(3 if checkpointing else REPEATS):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return None
    return Step(statistics.median(times), torch.cuda.max_memory_allocated() / 2**30)


def row(length: int, batch: int, checkpointing: bool) -> str:
    kinds = [(False, 1), (True, 1)] + ([(False, 2)] if length < 1 << 20 else [])
    steps = [measure(length, k * batch, rcps=rcps, checkpointing=checkpointing) for rcps, k in kinds]
    cells = []
    for step in steps[:2]:
        cells += ["-", "-", "does not fit"] if step is None else [
            f"{1e3 * step.seconds:.1f}", f"{batch * length / step.seconds:,.0f}", f"{step.peak:.1f}"
        ]  # fmt: skip
    two = None
    if steps[0] is not None:
        two = 2 * steps[0].seconds if len(steps) == 2 else None if steps[2] is None else steps[2].seconds
    cells.append("-" if two is None or steps[1] is None else f"{steps[1].seconds / two:.3f}")
    return f"| {length:,} | {batch} | {'yes' if checkpointing else 'no'} | {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", nargs="*", type=int, help="of these lengths; all if left out")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    columns = ["window", "windows a step", "checkpointing"]
    columns += [f"{kind} {what}" for kind in ("Ph", "PS") for what in ("ms", "bases/s", "peak GiB")]
    columns.append("PS against two of Ph")
    lines = ["# Caduceus", "", *describe(), "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    print("\n".join(lines), flush=True)
    for shape in (shape for shape in LENGTHS if not args.windows or shape[0] in args.windows):
        lines.append(row(*shape))
        print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
