"""The CUDA sources of the 2-D scan, and VMamba's block around it, without a GPU: emulated, and compiled by NVRTC."""

from functools import partial

import pytest
import torch

from polymamba.kernels import cross_scan, nvrtc

pytest.importorskip("triton")

from polymamba.kernels.cross_scan import cuda as cross_cuda
from polymamba.kernels.vss_block import VSSWeights, vss_block, vss_block_reference


def image(batch: int, height: int, width: int, channels: int, rank: int) -> dict[str, torch.Tensor]:
    """dt, B and C are parts of one projection, as VMamba has them."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt, B, C = normal(batch, height, width, 4, rank + 2).split([rank, 1, 1], dim=-1)
    return {
        "x": normal(batch, height, width, channels), "dt": dt, "A": -normal(4, channels, 1).exp(), "B": B, "C": C,
        "D": normal(4, channels), "dt_weight": normal(4, channels, rank), "dt_bias": normal(4, channels),
    }  # fmt: skip


@pytest.fixture
def launched(on_the_cpu, monkeypatch):
    """The names of the kernels of the 2-D scan that were launched."""
    names, launch = [], cross_cuda._Problem.launch

    def launch_and_tell(self, kernel, *results, **options):
        names.append(kernel)
        launch(self, kernel, *results, **options)

    monkeypatch.setattr(cross_cuda._Problem, "launch", launch_and_tell)
    return names


@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 7, 34, 3),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 1, 40, 4, 8), (1, 13, 1, 6, 1), (2, 1, 1, 4, 2))),
        (1, 17, 19, 8, 6),
    ],
)
def test_image_emulated(shape, launched, results_of, cast, assert_close):
    tensors = image(*shape)
    expected = results_of(cross_scan, tensors, "torch")
    assert_close(results_of(cross_scan, cast(tensors, torch.float32), "cuda"), expected, 3e-6, shape)
    assert launched == ["forward", "backward"]


def test_image_emulated_in_bfloat16(launched, results_of, cast, assert_close):
    tensors = image(1, 5, 9, 36, 6)
    kept = {"A", "D", "dt_bias", "dt_weight"}
    mixed = {name: x.to(torch.float32 if name in kept else torch.bfloat16) for name, x in tensors.items()}
    expected = results_of(cross_scan, cast(mixed, torch.float64), "torch")
    actual = results_of(cross_scan, mixed, "cuda")
    assert launched == ["forward", "backward"]
    assert_close(actual, expected, torch.finfo(torch.bfloat16).eps)
    assert actual["y"].dtype == torch.float32
    assert_close({"y": actual["y"]}, expected, 2e-6)


def test_an_image_feels_neither_its_batch_nor_the_plan(launched, monkeypatch, results_of, cast):
    """Few blocks have a direction each; any number of warps sums in the same order."""
    tensors = cast(image(2, 9, 8, 8, 2), torch.float32)
    y = results_of(cross_scan, tensors, "cuda")["y"]
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132)
    alone = {name: x[1:] if name in ("x", "dt", "B", "C") else x for name, x in tensors.items()}
    assert torch.equal(results_of(cross_scan, alone, "cuda")["y"], y[1:])
    monkeypatch.setattr(
        cross_cuda, "_plan", lambda kernel, *size: cross_cuda.Plan(8 if kernel == "forward" else 4, 1, 1)
    )
    assert torch.equal(results_of(cross_scan, tensors, "cuda")["y"], y)


@pytest.mark.slow
def test_image_operator(launched):
    tensors = tuple(x.float().requires_grad_() for x in image(1, 3, 4, 4, 2).values())
    torch.library.opcheck(torch.ops.polymamba.cross_scan.default, (*tensors, True))


def test_an_image_compiles_as_one_graph(launched):
    tensors = tuple(x.float().requires_grad_() for x in image(1, 3, 4, 4, 2).values())
    compiled = torch.compile(cross_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (cross_scan, compiled):
        y = function(*tensors, backend="cuda")
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    assert launched == ["forward", "backward"] * 2
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_without_nvrtc_an_image_is_four_scans_and_a_warning_says_so(on_the_cpu, monkeypatch, results_of, cast):
    tensors = cast(image(1, 3, 4, 4, 2), torch.float32)

    def refuse(source, name, device):
        raise nvrtc.Unavailable("no such library")

    monkeypatch.setattr(nvrtc, "kernel", refuse)
    monkeypatch.setattr(cross_cuda, "_broken", set())
    monkeypatch.setattr(cross_cuda, "four_scans", partial(cross_cuda.four_scans, backend="torch"))
    with pytest.warns(RuntimeWarning, match="runs as four selective scans, which is slower: no such library"):
        actual = results_of(cross_scan, tensors, "cuda")
    expected = results_of(cross_scan, tensors, "torch")
    assert all(torch.equal(x, expected[name]) for name, x in actual.items())


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize(
    ("length", "channels", "rank"), [(3136, 96, 6), pytest.param(49, 768, 48, marks=pytest.mark.slow)]
)
def test_image_sources_compile(kernel, length, channels, rank, compiler):
    macros = {"U": "bf16", "M": "bf16", "P": "float", "LOG": 1, "R": rank, "VR": 2, "WIDE": 1, "FAST": 1}
    plan = cross_cuda._plan(kernel, length, channels, rank)._asdict()
    source = cross_cuda._source(kernel, tuple({**macros, **plan}.items()))
    assert nvrtc.compile_source(source, "sm_90")[:4] == b"\x7fELF"


# VMamba's block: with Triton in its interpreter ---------------------------------------------------------------------

C, E, R, WIDE = 5, 6, 2, 12
WEIGHTS = VSSWeights(
    *((C,), (C,), (E, C), (E, 1, 3, 3), (E,), (4, R + 2, E), (4, E, R), (4, E), (4 * E, 1), (4 * E,), (E,), (E,)),
    *((C, E), (C,), (C,), (WIDE, C), (WIDE,), (C, WIDE), (C,)),
)


def block_problem(images: int, height: int, width: int, conv_bias: bool = True) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {name: normal(*shape) / shape[-1] ** 0.5 for name, shape in WEIGHTS._asdict().items()}
    if not conv_bias:
        weights["conv_bias"] = None
    return {"x": normal(images, height, width, C), **weights}


def run_block(x, *, backend, factors=None, **weights):
    run = vss_block_reference if backend == "torch" else vss_block
    return run(x, VSSWeights(**weights), dtype=x.dtype, eps=1e-5, factors=factors)


BLOCKS = {
    "plain": (2, 3, 4, True, False), "drop path": (3, 2, 5, False, True), "one row": (1, 1, 7, True, True),
    "one pixel": (2, 1, 1, False, False),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_its_parts(name, on_the_cpu, results_of, cast, assert_close):
    images, height, width, conv_bias, dropped = BLOCKS[name]
    tensors = block_problem(images, height, width, conv_bias)
    factors = torch.rand(2, images) if dropped else None
    expected = results_of(run_block, tensors, "torch", factors=factors)
    actual = results_of(run_block, cast(tensors, torch.float32), "cuda", factors=factors)
    assert_close(actual, expected, 1e-5, name)
    with torch.no_grad():  # saves nothing, and may add in another order
        y = run_block(**cast(tensors, torch.float32), backend="cuda", factors=factors)
    assert_close({"y": y}, expected, 1e-5, name)


def test_block_is_an_operator(on_the_cpu, cast):
    tensors = list(cast(block_problem(2, 3, 4), torch.float32).values())
    torch.library.opcheck(torch.ops.polymamba.vss_block.default, (tensors[0], tensors[1:], torch.float32, 1e-5))


def test_block_under_autocast(on_the_cpu, results_of, cast, assert_close):
    """What lies between the norms is in bfloat16, the residual stream in float32."""
    tensors = cast(block_problem(2, 3, 4), torch.float32)
    expected = results_of(run_block, cast(tensors, torch.float64), "torch")

    def run(x, *, backend, **weights):
        return vss_block(x, VSSWeights(**weights), dtype=torch.bfloat16, eps=1e-5)

    actual = results_of(run, tensors, "cuda")
    assert all(x.dtype == torch.float32 for x in actual.values())
    assert_close(actual, expected, 0.1)  # the interpreter truncates where a GPU rounds
