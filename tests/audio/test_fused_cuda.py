"""The loop in CUDA C++ without a GPU: emulated on the CPU against the CPU's own loop, and compiled by NVRTC."""

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from polymamba.audio import PRESETS, AudioConfig, AudioModel, Guided, UNetConfig
from polymamba.audio.config import START
from polymamba.audio.model import GuidedState
from polymamba.audio.writers import CudaWriter, FusedWriter
from polymamba.core import SamplingConfig
from polymamba.kernels import nvrtc

pytest.importorskip("triton")

from polymamba.audio import fused_cuda

SHAPES = {
    "unet": {"pool": (2, 3), "d_state": 5},
    "sashimi": {"pool": (3,), "layout": "sashimi", "norm": "layer", "d_conv": 1, "n_blocks": 2},
    "pairs": {"d_model": 6, "pool": (2,), "stages": ("mamba+mlp",)},
}
CONFIGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02),
]


@pytest.fixture
def on_the_cpu(emulated, monkeypatch):
    """The kernel emulated, as on a GPU of one multiprocessor, and launches of a few samples."""
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, device: emulated(source, name))
    monkeypatch.setattr(fused_cuda.selective_scan, "usable", lambda device: True)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 1)
    monkeypatch.setattr(fused_cuda, "FEW", (256, 1))
    monkeypatch.setattr(fused_cuda, "AT_A_TIME", 6)


def model_of(shape: str) -> AudioModel:
    torch.manual_seed(0)
    unet = UNetConfig(**{"d_model": 12, "n_blocks": 1, "d_state": 3, **SHAPES[shape]})
    model = AudioModel(AudioConfig(unet=unet, labels=("a", "b"))).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def begun(model, rows: int, n_read: int = 4):
    codes = torch.randint(256, (rows, n_read), generator=torch.Generator().manual_seed(3))
    codes[:, 0] = START
    with torch.no_grad():
        _, state = model(codes[:, :-1], labels=torch.arange(rows) % 3, return_state=True)
    return state, codes[:, -1]


def generators(rows: int):
    return [torch.Generator().manual_seed(row) for row in range(rows)]


def close(a, b, tolerance=2e-5):
    for ours, theirs in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if theirs.numel():
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize(("shape", "bf16"), [("unet", True), ("sashimi", False), ("pairs", False)])
@torch.no_grad()
def test_emulated(shape, bf16, on_the_cpu):
    """Codes, logits and states of the CPU's loop."""
    model = model_of(shape)
    state, unread = begun(model, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        writers = [kind(model, state, unread, SamplingConfig(), generators(2)) for kind in (CudaWriter, FusedWriter)]
    ours, theirs = (torch.zeros(2, 8, 256) for _ in writers)
    assert np.array_equal(writers[0].write(8, ours), writers[1].write(8, theirs))
    assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()
    close(writers[0].state, writers[1].state)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_choices_emulated(config, on_the_cpu):
    model = model_of("pairs")
    state, unread = begun(model, 2)
    ours, theirs = (kind(model, state, unread, config, generators(2)) for kind in (CudaWriter, FusedWriter))
    assert np.array_equal(ours.write(7), theirs.write(7))


@torch.no_grad()
def test_a_recording_feels_no_other(on_the_cpu, monkeypatch):
    """To the bit: alone, with others, by more threads, in pieces; and then at another place of the period than they."""
    model = model_of("unet")
    state, unread = begun(model, 3)

    def written(rows, threads, pieces):
        monkeypatch.setattr(fused_cuda, "MANY", (threads, 1))
        part = pytree.tree_map(lambda s: s[rows], state)
        writer = CudaWriter(model, part, unread[rows], SamplingConfig(), [generators(3)[row] for row in rows])
        codes = np.concatenate([writer.write(n) for n in pieces], 1)
        return codes, writer

    codes, writer = written([0, 1, 2], 256, [7])
    for rows, threads, pieces in (([2], 256, [2, 5]), ([1, 2], 512, [7])):
        again, other = written(rows, threads, pieces)
        assert np.array_equal(again, codes[rows])
        assert all(torch.equal(v, w[rows]) for v, w in zip(other.values, writer.values, strict=True))
    before = other.snapshot()
    codes = other.write(2)
    other.restore(before, np.array([True, False]))
    assert np.array_equal(other.write(2)[0], codes[0])


@torch.no_grad()
def test_guidance_emulated(on_the_cpu):
    model = Guided(model_of("pairs"), 2.0)
    state, unread = begun(model.model, 1)
    both = GuidedState(state, state._replace(label=torch.tensor([2])))
    ours, theirs = (kind(model, both, unread, SamplingConfig(), generators(1)) for kind in (CudaWriter, FusedWriter))
    assert np.array_equal(ours.write(7), theirs.write(7))
    close(ours.state, theirs.state)


@torch.no_grad()
def test_no_numbers_emulated(on_the_cpu):
    model = model_of("pairs")
    torch.nn.init.constant_(model.head.bias, float("nan"))
    writer = CudaWriter(model, *begun(model, 1), SamplingConfig(), generators(1))
    assert (writer.write(3) == -1).all()
    assert (writer.write(2) == -1).all()


SIZES = {"a small one": UNetConfig(d_model=24, n_blocks=1, pool=(3,), stages=("mamba+mlp",)), **PRESETS}


@pytest.mark.parametrize("size", ["a small one", *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS)])
def test_sources_compile(size, monkeypatch):
    if not nvrtc.loads():
        pytest.skip("needs NVRTC")
    compiled = []
    monkeypatch.setattr(nvrtc, "kernel", lambda source, *_: compiled.append(nvrtc.compile_source(source, "sm_90")))
    monkeypatch.setattr(fused_cuda.selective_scan, "usable", lambda device: True)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132)
    with torch.autocast("cpu", torch.bfloat16):
        fused_cuda.CudaModel(AudioModel(AudioConfig(unet=SIZES[size])), 1, guided=False)
    assert [code[:4] for code in compiled] == [b"\x7fELF"]
