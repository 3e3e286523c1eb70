"""What the kernels' tests share, as fixtures: results with all gradients, a comparison that says where it fails."""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polymamba.kernels import causal_conv1d, nvrtc, selective_scan
from polymamba.kernels.backends import INSTALLED, interpreting
from polymamba.kernels.mamba_block import BlockWeights, ScanWeights, mamba_block

Tensors = dict[str, Tensor | None]


def _device_of(backend: str) -> str:
    """Where a test runs `backend`: Triton in its interpreter, on the CPU, if there is no GPU."""
    if backend == "cuda" and not torch.cuda.is_available() and not nvrtc.EMULATED:
        pytest.skip("needs a CUDA GPU")
    if backend in ("numba", "triton"):
        pytest.importorskip(backend, exc_type=ImportError)  # numba may be there and refuse this numpy
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """All tensors in `dtype`, the complex ones in its complex twin."""
    return {
        name: None if x is None else x.to(dtype.to_complex() if x.is_complex() else dtype)
        for name, x in tensors.items()
    }


def _results_of(
    kernel: Callable, tensors: Tensors, backend: str, cotangents: tuple[Tensor, ...] = (),
    device: str | None = None, **options: object,
) -> dict[str, Tensor]:  # fmt: skip
    """Outputs (y, final_state) of a kernel and the gradients (grad_NAME) of all `tensors`, on the CPU.

    The gradients are those of the sum of outputs times `cotangents`, by default normal numbers, always the same.
    """
    device = device or _device_of(backend)
    leaves = {name: None if x is None else x.detach().to(device).requires_grad_() for name, x in tensors.items()}
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    outputs = kernel(**leaves, backend=backend, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    cotangents = cotangents or tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs)
    pairs = list(zip(outputs, cotangents, strict=True))
    sum((x * c.to(device, x.dtype)).real.sum() for x, c in pairs).backward()
    results = dict(zip(("y", "final_state"), outputs, strict=False))
    for name, x in leaves.items():
        if x is not None:
            results[f"grad_{name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    return {name: x.detach().cpu() for name, x in results.items()}


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, case: object = "") -> None:
    """Each tensor of `actual` against its namesake: max|difference| <= tolerance * max|expected|."""
    wrong = []
    for name, x in actual.items():
        reference = expected[name]
        assert x.shape == reference.shape, f"{case} {name}: shape {tuple(x.shape)}, expected {tuple(reference.shape)}"
        if x.numel() == 0:
            continue
        wide = torch.complex128 if reference.is_complex() else torch.float64
        difference = (x.to(wide) - reference.to(wide)).abs()
        error = (difference.max() / reference.to(wide).abs().max().clamp(min=1e-30)).item()
        if not error <= tolerance:  # NaN fails
            position = torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), x.shape)
            wrong.append(f"{case} {name}: error {error:.1e} > {tolerance:.0e}, largest at {[int(i) for i in position]}")
    assert not wrong, "\n" + "\n".join(wrong)


def _problem(
    batch: int = 1, length: int = 5, channels: int = 5, states: int = 3, groups: int = 1, *,
    static: str = "", absent: str = "", sequences: int | None = None, is_complex: bool = False, seed: int = 1,
) -> Tensors:  # fmt: skip
    """A scan in float64. `static` names those of B and C that do not depend on the input, `absent` what is left out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, of_complex: bool = False) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.complex128 if of_complex else torch.float64)

    decay = -torch.rand(channels, states, generator=generator, dtype=torch.float64) - 0.1
    tensors = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) * 1.5 - 1.0,
        "A": decay + 1j * normal(channels, states) if is_complex else decay,
        "B": normal(batch, length, groups, states, of_complex=is_complex),
        "C": normal(batch, length, groups, states, of_complex=is_complex),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) * 0.3,
        "initial_state": normal(batch if sequences is None else sequences, channels, states, of_complex=is_complex),
    }
    for name in static:
        tensors[name] = normal(channels, states, of_complex=is_complex)
    return {name: None if name in absent.split() else x for name, x in tensors.items()}


def _block_problem(
    batch: int = 2,
    length: int = 9,
    width: int = 6,
    channels: int = 10,
    states: int = 3,
    rank: int = 2,
    taps: int = 4,
    absent: str = "",
    scans: int = 1,
):
    """hidden, in_proj, out_proj, and the weights of each scan, of the second one with a 2 in their names."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    hidden = normal(batch, length, 2 * channels if "in_proj" in absent else width) * 3
    shapes = {
        "conv": (channels, 1, taps), "conv_bias": (channels,), "x_proj": (rank + 2 * states, channels),
        "dt_proj": (channels, rank), "dt_bias": (channels,), "A_log": (channels, states), "D": (channels,),
    }  # fmt: skip
    second = {f"{name}2": shape for name, shape in shapes.items()} if scans == 2 else {}
    shapes = {"in_proj": (2 * channels, width), "out_proj": (width, channels), **shapes, **second}
    absent = absent.split() + [f"{name}2" for name in absent.split()]
    weights = {name: None if name in absent else normal(*shape) for name, shape in shapes.items()}
    return {"hidden": hidden, **weights}


def _block_weights(tensors: dict[str, Tensor | None]) -> BlockWeights:
    names = [ScanWeights._fields, [f"{name}2" for name in ScanWeights._fields]]
    scans = tuple(ScanWeights(*(tensors.get(name) for name in own)) for own in names if own[0] in tensors)
    return BlockWeights(tensors.get("in_proj"), tensors.get("out_proj"), scans)


def _run_block(
    hidden: Tensor, *, backend: str, cu_seqlens: Tensor | None = None, reverse: tuple[bool, ...] = (False,),
    scale: float = 1.0, **weights: Tensor | None,
) -> Tensor:  # fmt: skip
    w = _block_weights(weights)
    if backend != "reference":
        options = {"cu_seqlens": cu_seqlens, "reverse": reverse, "scale": scale, "backend": backend}
        return mamba_block(hidden, w, dtype=hidden.dtype, **options)
    x, z = (hidden if w.in_proj is None else F.linear(hidden, w.in_proj)).chunk(2, dim=-1)
    total = 0
    for scan, backwards in zip(w.scans, reverse, strict=True):
        options = {"cu_seqlens": cu_seqlens, "reverse": backwards, "backend": backend}
        u = causal_conv1d(x, scan.conv[:, 0], scan.conv_bias, **options)
        rank, states = scan.dt_proj.shape[1], scan.A_log.shape[1]
        t, B, C = F.linear(u, scan.x_proj).split([rank, states, states], dim=-1)
        delta, A = F.linear(t, scan.dt_proj), -scan.A_log.exp()
        options |= {"delta_bias": scan.dt_bias, "delta_softplus": True}
        total = total + selective_scan(u, delta, A, B, C, scan.D, z, **options)
    return total if w.out_proj is None else F.linear(total, w.out_proj * scale)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    """Triton's interpreter patches triton.language anew at every call of a device function: half of its time."""
    if interpreting() and INSTALLED["triton"]:
        from triton.runtime import interpreter

        patch_once = functools.cache(interpreter._patch_lang)

        def call(function, *args, **kwargs):
            patch_once(function.fn)
            return function.rewrite()(*args, **kwargs)

        interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(scope="session")
def device_of():
    return _device_of


@pytest.fixture(scope="session")
def cast():
    return _cast


@pytest.fixture(scope="session")
def results_of():
    return _results_of


@pytest.fixture(scope="session")
def problem():
    return _problem


@pytest.fixture(scope="session")
def assert_close():
    return _assert_close


@pytest.fixture(scope="session")
def block():
    """A Mamba block: `problem` makes its tensors, `weights_of` its weights of these, `run` runs it by any backend."""
    return SimpleNamespace(problem=_block_problem, weights_of=_block_weights, run=_run_block)


@pytest.fixture
def forget():
    """Has functions and plans forgotten that were made for another machine."""
    pytest.importorskip("triton")
    from polymamba.kernels.cross_scan import cuda as cross_cuda
    from polymamba.kernels.selective_scan import cuda_plan

    def forgotten() -> None:
        plans = cuda_plan.forward_plan, cuda_plan.backward_plan
        for made in (cuda_plan._function, *plans, cross_cuda._function, cross_cuda._launch_of):
            made.cache_clear()

    return forgotten


@pytest.fixture
def on_the_cpu(monkeypatch, emulated, forget):
    """The CUDA path, its kernels emulated: chunks of 64 steps, units and parts of 32 above 4 states, tiles as on a GPU
    of one multiprocessor."""
    from polymamba.kernels.selective_scan import cuda, cuda_plan

    monkeypatch.setattr(nvrtc, "EMULATED", True)
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, device: emulated(source, name))
    monkeypatch.setattr(cuda, "usable", lambda device: True)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 1)
    monkeypatch.setattr(cuda_plan, "_room", lambda device: 2**18)
    monkeypatch.setattr(cuda_plan, "chunk_and_unit", lambda channels, states: (64, 32 if states > 4 else 64))
    monkeypatch.setattr(cuda_plan, "_PART", 32)
    monkeypatch.setitem(INSTALLED, "cuda", True)
    forget()
    yield
    forget()


@pytest.fixture
def compiler():
    if not nvrtc.loads():
        pytest.skip("needs NVRTC")
