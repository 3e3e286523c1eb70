"""Speed of the audio models: sample by sample, and in training.

    python benchmarks/audio.py cpu [--only writing|training] [--output FILE]     one thread; some minutes
    python benchmarks/audio.py gpu [--only writing|training] [--output FILE]     one GPU; some 5 minutes, training 1

Random weights, 16 kHz, float32 unless it says bf16 (then matrices alone are rounded). `polymamba audio generate` takes
the loop as one compiled kernel (audio/writers.py), and the CUDA graph for mixers that it does not know; `eager` steps
the same modules by plain PyTorch operators and draws each code by core's sampling, as all do. A real-time factor is
seconds of work for a second of sound of one stream: below 1 is faster than real time. Medians of one run; on the CPU of
the thread's own time, so that other work on the machine counts as little as it can.

A step of training is forward, cross-entropy, backward and AdamW of sc09-small, 8 x 16,000 samples; on a CPU of `tiny`
and little of it, to try this file. Beside it the same model, from the same weights on the same codes (the losses show
it), by plain PyTorch operations: backend "torch", 64 steps of time at once, and the definitions, which keep each state.
Both go along time in a Python loop, too slowly for 16,000 samples, so there is a crop of 500, at which all three are
measured, in float32: the plain ones by one step after one to warm up, ours by the median of 5 after 2.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from machine import describe

from polymamba.audio import PRESETS, AudioConfig, AudioModel
from polymamba.audio.config import START
from polymamba.audio.writers import CudaWriter, EagerWriter, FusedWriter, GraphWriter
from polymamba.core import SamplingConfig
from polymamba.core.speed import cell, cell_ms, median_seconds, with_peak
from polymamba.kernels.backends import choose

RATE = 16000
KERNELS = ("mamba_step", "mamba_block", "selective_scan", "causal_conv1d", "norm")


@contextmanager
def plain_pytorch(backend: str | None) -> Iterator[None]:
    """All kernels by this backend; None: by the one that they choose."""

    def always(asked, device, dtype, **options):
        return choose(asked or backend, device, dtype, **options)

    patches = [patch(f"polymamba.kernels.{name}.interface.choose", always) for name in KERNELS]
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()


def model_of(preset: str, device: str) -> AudioModel:
    torch.manual_seed(0)
    return AudioModel(AudioConfig(unet=PRESETS[preset])).eval().to(device)


def writer(kind: type, model: AudioModel, streams: int):
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(i) for i in range(streams)]
    start = torch.full((streams,), START, device=device)
    return kind(model, model.init_state(streams), start, SamplingConfig(), generators)


@torch.no_grad()
def seconds_per_sample(
    kind: type, preset: str, device: str, streams: int, n: int, repeats: int, *, bf16: bool = False
) -> float:
    """Of each stream; n whole periods at a time."""
    model = model_of(preset, device)
    n *= model.config.unet.period
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        w = writer(kind, model, streams)
        w.write(n)  # compiles, or captures
        return median(lambda: w.write(n), repeats, device) / n


def median(work: Callable[[], object], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        clock = time.process_time if device == "cpu" else time.perf_counter
        began = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    return statistics.median(times)


def training(preset: str, device: str, batch: int, length: int, backend: str | None, bf16: bool) -> tuple:
    """(seconds of a step, None without the memory for it; steps measured; peak in bytes; loss before the first)."""
    model = model_of(preset, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    codes = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = model(codes)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    repeats, warm_ups = (5, 2) if backend is None else (1, 1)
    on = torch.device(device)
    with plain_pytorch(backend):
        seconds, peak = with_peak(lambda: median_seconds(step, on, repeats, warm_ups), on)
    return seconds, repeats, peak, losses[0].item() if losses else None


def trainings(preset: str, device: str, batch: int, whole: int, crop: int) -> Iterator[tuple]:
    """Rows of the table: our kernels at `whole` samples, then all kernels at `crop` of them, in float32."""
    plans = [("ours", None, whole, True), ("ours", None, whole, False), ("ours", None, crop, False)]
    plans += [("plain PyTorch, 64 steps at once", "torch", crop, False), ("definitions", "reference", crop, False)]
    for name, backend, length, bf16 in plans:
        seconds, n_steps, peak, loss = training(preset, device, batch, length, backend, bf16)
        rate = None if seconds is None else batch * length / seconds
        yield (
            *(preset, name, "bf16" if bf16 else "fp32", f"{batch} x {length:,}", n_steps, cell_ms(seconds)),
            *(cell(rate, ",.0f"), cell(None if peak is None else peak / 2**30, ".2f"), cell(loss, ".5f")),
        )


def table(rows: list[tuple], heads: tuple[str, ...]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows]) + "\n"


def cpu_speeds(plans: list[tuple[str, int, int]]) -> Iterator[tuple]:
    """plans: preset, periods of the fast writer, periods of the eager one."""
    for preset, n_fast, n_eager in plans:
        ours = seconds_per_sample(FusedWriter, preset, "cpu", 1, n_fast, 5)
        eager = eager_seconds(preset, "cpu", 1, n_eager)
        yield preset, 1, f"{1 / ours:,.0f}", f"{ours * RATE:.2f}", f"{1 / eager:,.0f}", f"{eager / ours:.1f}"


def gpu_speeds(plans: list[tuple[str, int, int, int]]) -> Iterator[tuple]:
    """plans: preset, streams, periods, periods of the eager writer (0: not measured)."""
    for preset, streams, n, n_eager in plans:
        ours, halves = (seconds_per_sample(CudaWriter, preset, "cuda", streams, n, 5, bf16=b) for b in (False, True))
        graph = seconds_per_sample(GraphWriter, preset, "cuda", streams, n, 3)
        eager = eager_seconds(preset, "cuda", streams, n_eager) if n_eager else None
        rates = (f"{streams / seconds:,.0f}" for seconds in (ours, halves, graph))
        yield (
            *(preset, streams, *rates, f"{ours * RATE:.2f}", f"{halves * RATE:.2f}"),
            *(("-", "-") if eager is None else (f"{streams / eager:,.0f}", f"{eager / ours:.0f}")),
        )


def eager_seconds(preset: str, device: str, streams: int, n: int) -> float:
    with plain_pytorch("reference"):
        return seconds_per_sample(EagerWriter, preset, device, streams, n, 3)


CPU_HEADS = ("model", "streams", "samples/s", "real-time factor", "eager, samples/s", "ratio")
GPU_HEADS = (
    *("model", "streams", "float32, samples/s", "bf16", "CUDA graph", "real-time factor", "of bf16"),
    *("eager, samples/s", "ratio, float32"),
)
TRAINING_HEADS = (
    *("model", "kernels", "precision", "batch", "steps measured", "ms a step", "samples/s", "peak GiB"),
    "loss before the first",
)
CPU_PLANS = [("tiny", 300, 4), ("youtubemix", 40, 1), ("sc09-small", 150, 4), ("sc09-large", 40, 2)]
GPU_PLANS = [
    *(("sc09-small", 1, 100, 4), ("youtubemix", 1, 8, 1), ("sc09-large", 1, 40, 0)),
    *(("sc09-small", 128, 50, 4), ("youtubemix", 128, 8, 0), ("sc09-large", 128, 20, 0)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("where", choices=("cpu", "gpu"))
    parser.add_argument("--only", choices=("writing", "training"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    on_cpu = args.where == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    text = ["  \n".join(describe()), ""]
    print(text[0], flush=True)
    if args.only != "training":
        rows = cpu_speeds(CPU_PLANS) if on_cpu else gpu_speeds(GPU_PLANS)
        text.append(table(list(_shown(rows)), CPU_HEADS if on_cpu else GPU_HEADS))
    if args.only != "writing":
        rows = trainings("tiny", "cpu", 2, 160, 80) if on_cpu else trainings("sc09-small", "cuda", 8, 16000, 500)
        text.append(table(list(_shown(rows)), TRAINING_HEADS))
    print("\n".join(text[1:]))
    if args.output:
        args.output.write_text("\n".join(text) + "\n")


def _shown(rows: Iterator[tuple]) -> Iterator[tuple]:
    for row in rows:
        print(*row, file=sys.stderr, flush=True)
        yield row


if __name__ == "__main__":
    main()
