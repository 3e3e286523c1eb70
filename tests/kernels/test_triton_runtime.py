"""The elementary functions and the ordered sum of the Triton kernels against float64."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from polymamba.kernels import triton_runtime  # noqa: E402
from polymamba.kernels.triton_runtime import exp_negative, sigmoid, softplus, softplus_and_slope, sum_first_axis  # noqa: E402

UNIT = np.finfo(np.float32).eps
NEGATIVE = -np.logspace(-8, np.log10(87), 20_001)
BOTH_SIGNS = np.concatenate((NEGATIVE, -NEGATIVE, [0.0]))


@triton.jit
def _apply(x, out, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n)
    if FUNCTION == "exp_negative":
        values = exp_negative(values)
    if FUNCTION == "sigmoid":
        values = sigmoid(values)
    if FUNCTION == "softplus":
        values = softplus(values)
    if FUNCTION == "slope of softplus":
        values = softplus_and_slope(values)[1]
    tl.store(out + at, values, mask=at < n)


def apply(name: str, x, device: str) -> np.ndarray:
    x = torch.tensor(np.asarray(x, np.float32), device=device)
    out = torch.empty_like(x)
    _apply[(triton.cdiv(len(x), 4096),)](x, out, len(x), FUNCTION=name, BLOCK=4096)
    return out.cpu().numpy()


def logistic(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("name", "exact", "points"),
    [
        ("exp_negative", np.exp, NEGATIVE),
        ("softplus", lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), BOTH_SIGNS),
        ("slope of softplus", logistic, BOTH_SIGNS),
    ],
)
def test_relative_error_of_a_few_units(name, exact, points, device_of):
    points = points.astype(np.float32)
    expected = exact(points.astype(np.float64))
    assert (np.abs(apply(name, points, device_of("triton")) - expected) / expected).max() < 6 * UNIT


def test_error_of_the_sigmoid(device_of):
    """Of a few units, and |x| more where it is small."""
    points = BOTH_SIGNS.astype(np.float32)
    expected = logistic(points.astype(np.float64))
    error = np.abs(apply("sigmoid", points, device_of("triton")) - expected) / expected
    assert (error / (5 + np.maximum(-points, 0))).max() < UNIT


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # at -inf, -1e4, 1e4, inf, nan
        ("sigmoid", [0, 0, 1, 1, np.nan]),
        ("softplus", [0, 0, 1e4, np.inf, np.nan]),
        ("slope of softplus", [0, 0, 1, 1, np.nan]),
    ],
)
def test_at_the_ends_and_nan(name, expected, device_of):
    actual = apply(name, [-np.inf, -1e4, 1e4, np.inf, np.nan], device_of("triton"))
    assert np.array_equal(actual, np.float32(expected), equal_nan=True)


@pytest.mark.parametrize("n_terms", [0, 1, 3, 64, 65, 200, 512, 1100])
def test_sum_first_axis(n_terms, device_of):
    x = torch.randn(n_terms, 3, 100, device=device_of("triton"))
    total = sum_first_axis(x)
    torch.testing.assert_close(total.double(), x.double().sum(0), rtol=1e-6, atol=3e-5)
    # The order is that of the index: other columns beside it change nothing.
    assert torch.equal(sum_first_axis(x[:, :1, :7].contiguous()), total[:1, :7])


class Kernel:
    """In the place of a jitted function: tells what it is compiled for, and what is run."""

    arg_names = ("x", "y", "n", "scale", "WIDTH")
    constexprs = (4,)

    def __init__(self):
        self.compiled, self.runs = [], []

    def __getitem__(self, grid):
        def first(*given, **named):
            self.compiled.append((grid, given, named))
            return self

        return first

    function, packed_metadata = "function", "metadata"

    def run(self, *arguments):
        self.runs.append(arguments)


def test_a_compiled_kernel_is_remembered_for_arguments_of_the_same_kinds(monkeypatch):
    monkeypatch.setattr(triton_runtime, "_INTERPRETING", False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    kernel, x = Kernel(), torch.zeros(64)
    call = {"y": None, "n": 5, "scale": 0.5, "WIDTH": 8, "num_warps": 2}
    triton_runtime.launch(kernel, 3, x, **call)
    assert kernel.compiled == [((3,), (x,), call)]
    triton_runtime.launch(kernel, 4, x, **{**call, "n": 21, "scale": 0.25})
    fixed = (4, 1, 1, 7, "function", "metadata", None, None, None)
    assert kernel.runs == [(*fixed, x.data_ptr(), None, 21, 0.25, 8)]
    others = [
        *({"y": x}, {"n": 16}, {"n": 1}, {"n": 2**40 + 1}, {"WIDTH": 4}, {"num_warps": 4}),
        *({"x": x[1:]}, {"x": x.double()}),
    ]
    for number, change in enumerate(others):
        changed = {"x": x, **call, **change}
        triton_runtime.launch(kernel, 3, **changed)
        assert len(kernel.compiled) == number + 2, change
        triton_runtime.launch(kernel, 3, **changed)
        assert len(kernel.compiled) == number + 2, change


@pytest.mark.gpu
@pytest.mark.parametrize("skipped", [0, 1])
def test_launched_again_with_other_numbers(skipped):
    """As Triton launches it: a sum of 3 rows, and then one of 5, at an address that divides by 16 or not."""
    for rows in (3, 5, 3):
        x = torch.randn(skipped + rows * 37, device="cuda")[skipped:].view(rows, 37)
        assert torch.allclose(sum_first_axis(x), x.sum(0), rtol=1e-5, atol=1e-6)
