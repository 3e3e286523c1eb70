"""A step of several Mamba blocks in CUDA C++, emulated on the CPU: against float64, one block after another."""

import pytest
import torch

pytest.importorskip("triton")

from polymamba.kernels import nvrtc
from polymamba.kernels.mamba_step import MambaWeights, cuda, mamba_step_reference

CASES = {  # kind, rows, width, inner width, rank, taps, LayerNorm
    "one": ("few", 1, 256, 512, 16, 4, False),
    "LayerNorm": ("few", 2, 256, 256, 24, 3, True),
    "many": ("many", 11, 256, 512, 48, 4, False),
    "very many": ("many", 41, 256, 256, 16, 2, False),
}


def problem(rows, width, inner, rank, taps, centred, n_layers=2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    weights = [
        MambaWeights(
            norm=1 + normal(width, scale=0.1),
            norm_bias=normal(width) if centred else None,
            in_proj=normal(2 * inner, width, scale=width**-0.5),
            conv=normal(inner, taps, scale=0.5),
            conv_bias=normal(inner) if i else None,
            x_proj=normal(rank + 32, inner, scale=inner**-0.5),
            dt_proj=normal(inner, rank, scale=rank**-0.5),
            dt_bias=normal(inner) - 4,
            A_log=(torch.rand(inner, 16, generator=generator) * 3).bfloat16(),
            D=normal(inner),
            out_proj=normal(width, inner, scale=inner**-0.5),
        )
        for i in range(n_layers)
    ]
    states = [(normal(rows, inner, taps - 1), normal(rows, inner, 16).float()) for _ in weights]
    return normal(rows, width), states, weights


def expected(x, states, weights, centred):
    x, stream = x.double(), None
    for w, (conv, ssm) in zip(weights, states, strict=True):
        w = MambaWeights(*(None if t is None else t.double() for t in w))
        x, stream = mamba_step_reference(x, stream, conv, ssm, w, 1e-5, centred)
    return stream + x


@pytest.mark.parametrize("case", CASES)
def test_emulated(case, emulated, monkeypatch, assert_close):
    kind, rows, *sizes = CASES[case]
    monkeypatch.setattr(nvrtc, "EMULATED", True)
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, device: emulated(source, name))
    monkeypatch.setattr(nvrtc, "processors", lambda device: 5)
    monkeypatch.setattr(cuda, "kind_of", lambda *_: kind)
    x, states, weights = problem(rows, *sizes)
    wide = [(conv.double(), ssm.double()) for conv, ssm in states]
    for _ in range(2):
        assert cuda.serves(x, states, weights, sizes[-1])
        stream = cuda.step(x, states, weights, 1e-5, sizes[-1])
        of_float64 = expected(x, wide, weights, sizes[-1])
    actual = {"stream": stream, **{f"{n} {i}": s for i, st in enumerate(states) for n, s in zip("cs", st, strict=True)}}
    wanted = {"stream": of_float64, **{f"{n} {i}": s for i, st in enumerate(wide) for n, s in zip("cs", st, strict=True)}}
    for name, x in actual.items():
        print(name, (x.double() - wanted[name]).abs().max() / wanted[name].abs().max())
    assert_close({k: v.float() for k, v in actual.items()}, wanted, 1e-2)


@pytest.mark.parametrize("centred", [False, True])
def test_head_emulated(centred, emulated, monkeypatch, assert_close):
    monkeypatch.setattr(nvrtc, "EMULATED", True)
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, device: emulated(source, name))
    monkeypatch.setattr(nvrtc, "processors", lambda device: 3)
    generator = torch.Generator().manual_seed(0)
    stream = 3 * torch.randn(2, 256, generator=generator)
    norm, bias, weight = (torch.randn(s, generator=generator).bfloat16() for s in ((256,), (256,), (301, 256)))
    logits = cuda.head(stream, norm, bias if centred else None, weight, 1e-5)
    assert logits is not None
    wide = stream.double()
    if centred:
        wide = wide - wide.mean(1, keepdim=True)
    normed = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm + (bias.double() if centred else 0)
    assert_close({"logits": logits.float()}, {"logits": normed @ weight.double().T}, 1e-2)


@pytest.mark.parametrize("rows", [3, 70])
def test_project_and_scan_emulated(rows, emulated, monkeypatch, assert_close):
    monkeypatch.setattr(nvrtc, "EMULATED", True)
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, device: emulated(source, name))
    monkeypatch.setattr(nvrtc, "processors", lambda device: 5)
    monkeypatch.setattr(cuda, "SCAN_WARPS", 4)
    _, [(_, ssm)], [w] = problem(rows, 256, 256, 48, 4, False, 1)
    uz = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    u, z = uz.double().chunk(2, 1)
    dt, B, C = (u @ w.x_proj.double().T).split([48, 16, 16], 1)
    dt = torch.nn.functional.softplus(dt @ w.dt_proj.double().T + w.dt_bias)
    state = (dt[..., None] * -w.A_log.double().exp()).exp() * ssm + (dt * u)[..., None] * B[:, None]
    y = ((state * C[:, None]).sum(-1) + w.D * u) * torch.nn.functional.silu(z)
    actual = cuda.project_and_scan(uz, w, ssm)
    assert actual is not None
    assert_close({"y": actual.float(), "state": ssm}, {"y": y, "state": state}, 1e-2)
