"""The selective scan and the convolution on a GPU: milliseconds forward and backward, peak memory, share of the limit.

    python benchmarks/scan.py [--output benchmarks/results/scan_gpu.md]

bf16 inputs, float32 A, D and bias, softplus; medians of `triton.testing.do_bench` (CUDA events). Inputs beyond the
second-level cache, except where the shape is small. The limit is the larger of two times: each input read and each
output written once at the copy bandwidth measured in the same run, and one exp2 a (token, channel, state) at 16 a cycle
and multiprocessor.
"""

import argparse
from pathlib import Path

import torch
from machine import describe
from triton.testing import do_bench

from polymamba.kernels import causal_conv1d, selective_scan

SHAPES = [  # batch, channels, length, states, groups, gate
    (8, 2048, 2048, 16, 1, True),
    (1, 5120, 2048, 16, 1, True),
    (2, 2048, 8192, 16, 1, True),
    (128, 384, 197, 16, 1, True),
    (64, 768, 3136, 1, 4, False),
    (64, 3072, 196, 1, 4, False),
    (8, 2048, 2048, 64, 1, True),
    (8, 128, 65536, 16, 1, True),
    (1, 2048, 131072, 16, 1, True),
    (8, 512, 131072, 16, 1, True),
    (1, 512, 1048576, 16, 1, True),
]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def scan_inputs(
    batch: int, channels: int, length: int, states: int, groups: int, gate: bool
) -> list[torch.Tensor | None]:
    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    u, z = randn(batch, length, channels), randn(batch, length, channels) if gate else None
    delta, A = randn(batch, length, channels) * 0.5, -torch.rand(channels, states, device="cuda") * states - 0.1
    B, C = randn(batch, length, groups, states), randn(batch, length, groups, states)
    D, bias = randn(channels, dtype=torch.float32), randn(channels, dtype=torch.float32) - 4
    return [u, delta, A, B, C, D, z, bias]


def measure(inputs: list[torch.Tensor | None]) -> tuple[float, float, float]:
    """(forward ms, backward ms, MiB that forward and backward add at their peak)."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    present = [x for x in leaves if x is not None]

    def forward() -> torch.Tensor:
        return selective_scan(*leaves[:7], delta_bias=leaves[7], delta_softplus=True)

    with torch.no_grad():
        forward_ms = do_bench(forward, return_mode="median")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = forward()
    dy = torch.randn_like(y)
    torch.autograd.grad(y, present, dy, retain_graph=True)
    peak = torch.cuda.max_memory_allocated() - before
    backward_ms = do_bench(lambda: torch.autograd.grad(y, present, dy, retain_graph=True), return_mode="median")
    return forward_ms, backward_ms, peak / 2**20


def report() -> str:
    bandwidth = copy_bandwidth()
    properties = torch.cuda.get_device_properties(0)
    exps = 16 * properties.multi_processor_count * 1.755e9
    lines = ["# Selective scan on the GPU", "", *describe(), f"copy: {bandwidth / 1e12:.2f} TB/s", ""]
    lines += [
        "| B, D, L, N | G | z | forward ms | limit | share | backward ms | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        batch, channels, length, states, groups, gate = shape
        elements = batch * channels * length
        forward_ms, backward_ms, peak = measure(scan_inputs(*shape))
        moved = elements * 2 * (4 if gate else 3) + 2 * batch * length * groups * states * 2
        limit = 1e3 * max(moved / bandwidth, elements * states / exps)
        figures = f"{forward_ms:.3f} | {limit:.3f} | {limit / forward_ms:.0%} | {backward_ms:.3f} | {peak:.0f}"
        lines.append(f"| {batch}, {channels}, {length}, {states} | {groups} | {'yes' if gate else 'no'} | {figures} |")
    x = torch.randn(8, 2048, 2048, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2048, 4, device="cuda"), torch.randn(2048, device="cuda")
    ms = do_bench(lambda: causal_conv1d(x, weight, bias), return_mode="median")
    share = 4 * x.numel() / bandwidth * 1e3 / ms
    lines += ["", f"causal_conv1d 8 x 2048 x 2048, width 4, SiLU: forward {ms:.3f} ms, {share:.0%} of copy bandwidth"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = report()
    print(text)
    if args.output:
        args.output.write_text(text)
