"""How the scan's CUDA kernels are laid out, and what compilers say of that: no GPU."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from polymamba.kernels import nvrtc

pytest.importorskip("triton")

import triton

from polymamba.kernels.selective_scan import cuda, cuda_plan, cuda_tiles


@pytest.fixture
def sources(monkeypatch, forget):
    """The sources that a forward and a backward in bf16 with a gate would have on an H100: (function, source) each."""
    found = []
    monkeypatch.setattr(nvrtc, "EMULATED", True)
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, device: found.append((name, source)) or (lambda *_: None))
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132)
    monkeypatch.setattr(cuda, "usable", lambda device: True)
    monkeypatch.setattr(cuda_plan, "_room", lambda device: 227 * 1024)

    def of(sequences: int, length: int, channels: int, states: int) -> list[tuple[str, str]]:
        n = sequences * length
        u, B = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((n, channels), (n, 1, states)))
        A, D = (torch.empty(shape, device="meta") for shape in ((channels, states), (channels,)))
        arguments = (u, u, A, B, B, D, u, D, None, None, sequences)
        found.clear()
        forget()
        y, _, saved = cuda.forward(*arguments, True, False, True)
        cuda.backward(y, None, *arguments, saved, True, False)
        return list(found)

    yield of
    forget()


@pytest.mark.parametrize(
    ("states", "architecture"),
    [
        (16, "sm_90"),
        *(pytest.param(n, a, marks=pytest.mark.slow) for n, a in ((1, "sm_90"), (64, "sm_90"), (16, "sm_80"))),
    ],
)
def test_every_source_compiles(states, architecture, compiler, sources, monkeypatch):
    shape = 1, 3 * cuda_plan.chunk_and_unit(64, states)[0], 64, states
    found = sources(*shape)
    monkeypatch.setattr(cuda_plan, "_ROWS_A_PROCESSOR", 0)  # chunks walked, which takes another kernel
    found += sources(*shape)
    assert {name for name, _ in found} == {"scan_forward", "carry", "chunk_gradients", "scan_backward", "sum_shares"}
    for source in {source for _, source in found}:
        assert nvrtc.compile_source(source, architecture)[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize("states", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize(("sequences", "length", "channels"), [(256, 197, 1024), (1, 8192, 512)])
def test_registers_hold_all_that_a_lane_needs(sequences, length, channels, states, compiler, sources, tmp_path):
    """What they do not hold goes by way of memory: that took two thirds of the time of a forward of many rows, of 4
    states each (benchmarks/SCAN_NOTES.md)."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("needs the cuobjdump that comes with Triton")
    for name, source in sources(sequences, length, channels, states):
        (tmp_path / "code").write_bytes(nvrtc.compile_source(source, "sm_90"))
        command = [str(cuobjdump), "--dump-sass", str(tmp_path / "code")]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "EXIT" in code
        assert not [line for line in code.splitlines() if "STL" in line or "LDL" in line], name


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [227, 163, 99])
@pytest.mark.parametrize("states", [4, 8, 16, 32, 64])
def test_shared_memory_fits(states, kilobytes, emulation, tmp_path):
    """Of a block of the backward: in 227 KiB on Hopper (a second block beside it, too), 163 on an A100, 99 on a GPU for
    a desk. The compiler is asked for the size."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    limit = kilobytes * 1024 if kilobytes < 227 else (228 // 2 - 1) * 1024
    tile = cuda_tiles.backward_tile(states, 10**6, 2, 132, kilobytes * 1024, True)
    macros = {"N": states, "VB": 4, "CHUNK": 2048, "UNIT": 256, "SPAN": 2048, "EVERY": 32, "SOFTPLUS": 1, "GATE": 1}
    macros |= {"STATIC_B": 0, "STATIC_C": 0, "PART": 512, "ENTERING": 512}
    types = dict.fromkeys(("U", "DELTA", "Z", "DY", "MB", "MC"), "float")
    source = cuda_plan._source("backward", tuple({**macros, **types, **tile._asdict()}.items()))
    path = tmp_path / "size.cpp"
    path.write_text(emulation(source) + f'\nstatic_assert(sizeof(Shared) <= {limit}, "too much");\n')
    done = subprocess.run(["g++", "-std=c++17", "-w", "-fsyntax-only", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(
    ("runs", "channels", "groups", "pairs"),
    [(1, 5120, 1, 5), (2, 2048, 1, 4), (8, 768, 1, 6), (4, 2048, 1, 4), (1, 64, 1, 1), (4, 768, 4, 3)],
)
def test_pairs_of_a_block_fill_the_multiprocessors_evenly(runs, channels, groups, pairs):
    """132 of them."""
    layout = SimpleNamespace(n_states=16, n_channels=channels, groups=groups, vector=2)
    tile = cuda_tiles.pairs_tile(layout, runs, 132)
    assert pairs == tile.WARPS


@pytest.mark.parametrize(
    ("sequences", "channels", "length", "at_once"),
    [
        (1, 1536, 8192, True), (1, 1024, 4096, True), (5, 512, 8192, True), (1, 512, 2**20, True),
        (1, 1536, 4096, False),  # two chunks: two passes over one are no shorter
        (1, 2304, 8192, False),  # 144 blocks at once: the fullest multiprocessor would have two
        (3, 768, 8192, False), (2, 2048, 8192, False),
    ],
)  # fmt: skip
def test_chunks_are_run_at_once_where_they_fill_the_multiprocessors(sequences, channels, length, at_once, monkeypatch):
    """132 of them."""
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132)
    u = torch.empty(sequences * length, channels, dtype=torch.bfloat16, device="meta")
    A, B = torch.empty(channels, 16, device="meta"), torch.empty(len(u), 1, 16, dtype=torch.bfloat16, device="meta")
    _, layout = cuda._ready(u, u, A, B, B, A[:, 0], u, A[:, 0], None, sequences, True, False)
    assert cuda_plan._at_once(cuda_plan.Plan(layout)) == at_once


def test_more_tokens_than_32_bits_count_are_for_triton(monkeypatch):
    monkeypatch.setattr(cuda, "usable", lambda device: True)
    for n_tokens, served in ((2**31 - 2**15, True), (2**31 - 2**13, False), (2**31, False)):
        assert cuda._serves(torch.empty(n_tokens, 1, dtype=torch.bfloat16, device="meta"), n_states=4) == served


@pytest.mark.parametrize(
    ("states", "channels", "warps"), [(16, 5120, 10), (8, 5120, 5), (4, 5120, 3), (64, 2048, 8), (16, 64, 1)]
)
def test_warps_that_walk_chunks_fill_the_multiprocessors_evenly(states, channels, warps):
    layout = SimpleNamespace(n_states=states, n_channels=channels, groups=1, vector=2)
    assert warps == cuda_tiles.walking_tile(layout, 1, 132).WARPS


@pytest.mark.slow
def test_shared_memory_of_pairs_fits(emulation, tmp_path):
    """Of as many as a block may have, on a GPU for a desk: 99 KiB."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    layout = SimpleNamespace(n_states=16, n_channels=8 * cuda_tiles.MOST_PAIRS, groups=1, vector=2)
    tile = cuda_tiles.pairs_tile(layout, 1, 1)
    assert tile.WARPS == cuda_tiles.MOST_PAIRS
    macros = {"N": 16, "VB": 4, "CHUNK": 2048, "PART": 2048, "UNIT": 256, "SPAN": 2048, "EVERY": 32, "SOFTPLUS": 1}
    macros |= {"GATE": 1, "STATIC_B": 0, "STATIC_C": 0, "OWN": 1, "ENDS": 0}
    types = dict.fromkeys(("U", "DELTA", "Z", "DY", "MB", "MC"), "float")
    source = cuda_plan._source("forward_pairs", tuple({**macros, **types, **tile._asdict()}.items()))
    path = tmp_path / "size.cpp"
    path.write_text(emulation(source) + '\nstatic_assert(sizeof(Shared) <= 99 * 1024, "too much");\n')
    done = subprocess.run(["g++", "-std=c++17", "-w", "-fsyntax-only", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
