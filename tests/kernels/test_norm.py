"""The fused norms: every backend against the reference, and that against PyTorch's own."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymamba.kernels import layer_norm, rms_norm
from polymamba.kernels.norm import layer_norm_alone

FAST = ["numba", "triton"]
ALL = ["reference", "torch", *FAST]
AT_SIZE = [pytest.param("numba", marks=pytest.mark.slow), pytest.param("triton", marks=pytest.mark.gpu)]
NORMS = {"rms_norm": rms_norm, "layer_norm": layer_norm}


def problem(*shape: int, absent: str = "", seed: int = 1) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = shape[-1]
    tensors = {"x": normal(*shape), "residual": 1 + 2 * normal(*shape), "weight": normal(channels)}
    tensors["bias"] = normal(channels)
    return {name: None if name in absent.split() else x for name, x in tensors.items()}


def run(x, residual, weight, bias=None, *, norm, backend, eps=1e-3):
    """As `results_of` calls it: the second output, the stream, is reported as final_state."""
    extra = {} if bias is None else {"bias": bias}
    return norm(x, weight, eps=eps, residual=residual, backend=backend, **extra)


OPTIONS = {
    "one channel": ((5, 1), "bias"),
    "odd": ((2, 3, 7), ""),
    "a vector": ((9,), ""),
    "no row": ((0, 4), ""),
    "more rows than a piece": ((131, 5), "bias"),
    "many channels": ((3, 1100), ""),
    "a row longer than a tile": ((2, 4099), ""),
    "no residual": ((2, 35, 70), "residual"),
    "bare": ((4, 6), "residual bias"),
}


@pytest.mark.parametrize("residual", [False, True])
def test_the_reference_is_torchs_norm(residual):
    tensors = problem(2, 9, 5, absent="" if residual else "residual")
    stream = tensors["x"] + (tensors["residual"] if residual else 0)
    ours, kept = run(**tensors, norm=layer_norm, backend="reference")
    torch.testing.assert_close(ours, F.layer_norm(stream, (5,), tensors["weight"], tensors["bias"], 1e-3))
    torch.testing.assert_close(kept, stream)
    del tensors["bias"]
    ours, kept = run(**tensors, norm=rms_norm, backend="reference")
    torch.testing.assert_close(ours, F.rms_norm(stream, (5,), tensors["weight"], 1e-3))
    torch.testing.assert_close(kept, stream)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, norm, backend, results_of, cast, assert_close):
    shape, absent = OPTIONS[name]
    tensors = problem(*shape, absent=absent if norm == "layer_norm" else f"{absent} bias")
    kernel = functools.partial(run, norm=NORMS[norm])
    expected = results_of(kernel, tensors, "reference")
    actual = results_of(kernel, cast(tensors, torch.float32), backend)
    assert_close(actual, expected, 3e-6, f"{name}, {norm}, {backend}")


@pytest.mark.parametrize("backend", AT_SIZE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 1025, 768), (5000, 63), (37, 8192), (3, 20_000)])
def test_at_size(shape, norm, backend, device_of, results_of, cast, assert_close):
    tensors = problem(*shape, absent="" if norm == "layer_norm" else "bias")
    kernel = functools.partial(run, norm=NORMS[norm])
    expected = results_of(kernel, tensors, "reference", device=device_of(backend))
    assert_close(results_of(kernel, cast(tensors, torch.float32), backend), expected, 5e-6, f"{norm}, {backend}")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data, results_of, cast, assert_close):
    norm = data.draw(st.sampled_from(sorted(NORMS)))
    shape = data.draw(st.integers(0, 300), label="rows"), data.draw(st.integers(1, 300), label="channels")
    absent = data.draw(st.sampled_from(["", "residual"])) + ("" if norm == "layer_norm" else " bias")
    tensors, kernel = problem(*shape, absent=absent), functools.partial(run, norm=NORMS[norm])
    expected = results_of(kernel, tensors, "reference")
    assert_close(results_of(kernel, cast(tensors, torch.float32), "numba"), expected, 1e-5, (norm, shape, absent))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absent", ["", "residual"])
def test_half_precision(absent, dtype, backend, results_of, cast, assert_close):
    """Inputs, weights and their gradients in half precision, the stream in float32."""
    tensors = problem(3, 37, 70, absent=absent)
    mixed = cast(tensors, dtype) | {"residual": None if absent else tensors["residual"].float()}
    kernel = functools.partial(run, norm=layer_norm)
    actual = results_of(kernel, mixed, backend)
    wide = {name for name, x in actual.items() if x.dtype == torch.float32}
    assert wide == {"final_state"} | (set() if absent else {"grad_residual"})
    expected = results_of(kernel, cast(mixed, torch.float64), "reference")
    assert_close(actual, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", FAST)
def test_of_float32_rows_with_bfloat16_weights(backend, device_of):
    device = device_of(backend)
    tensors = {k: x.float().to(device) for k, x in problem(4, 9, absent="residual bias").items() if x is not None}
    y, stream = rms_norm(tensors["x"], tensors["weight"].bfloat16(), backend=backend)
    assert y.dtype == torch.bfloat16
    assert stream is tensors["x"]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone(dtype, backend, device_of):
    tensors = problem(4, 9, absent="residual")
    x, weight, bias = (tensors[name].to(device_of(backend), dtype).requires_grad_() for name in ("x", "weight", "bias"))
    both = (
        layer_norm(x, weight, bias, 1e-3, backend=backend)[0],
        layer_norm_alone(x, weight, bias, 1e-3, backend=backend),
    )
    results = [(y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))) for y in both]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


# Triton's interpreter cuts the digits off where a GPU rounds.
@pytest.mark.parametrize("backend", ["reference", "numba", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("norm", NORMS)
def test_in_a_dtype_of_choice(norm, backend, results_of, cast):
    """The same numbers as rounded afterwards, to the bit, and so the gradients."""
    tensors = cast(problem(5, 37, absent="" if norm == "layer_norm" else "bias"), torch.float32)
    rounding = functools.partial(NORMS[norm], dtype=torch.bfloat16)

    def rounded(*args, **kwargs):
        y, stream = NORMS[norm](*args, **kwargs)
        return y.bfloat16(), stream

    results = [results_of(functools.partial(run, norm=n), tensors, backend) for n in (rounding, rounded)]
    assert results[0]["y"].dtype == torch.bfloat16
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("used", ["y", "final_state"])
def test_gradients_of_one_output(used, backend, results_of, cast, assert_close):
    tensors = problem(4, 9)

    def one(*args, backend, **kwargs):
        y, stream = run(*args, backend=backend, norm=layer_norm, **kwargs)
        return y if used == "y" else stream

    expected = results_of(one, tensors, "reference")
    assert_close(results_of(one, cast(tensors, torch.float32), backend), expected, 2e-6, used)


@pytest.mark.parametrize("backend", FAST)
def test_views(backend, device_of):
    """Some columns of a wider matrix, a transposed one."""
    device = device_of(backend)
    tensors = {k: x.float().to(device) for k, x in problem(6, 6).items()}
    expected = run(**tensors, norm=layer_norm, backend=backend)
    x = torch.cat((tensors["residual"], tensors["x"]), dim=1)[:, 6:]
    views = {**tensors, "x": x, "residual": tensors["residual"].mT.contiguous().mT}
    for ours, theirs in zip(run(**views, norm=layer_norm, backend=backend), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("norm", NORMS)
def test_a_row_is_its_own(norm, backend, results_of, cast):
    """To the bit, its gradients too; a NaN stays in its row."""
    tensors = cast(problem(150, 33, absent="" if norm == "layer_norm" else "bias"), torch.float32)
    tensors["x"][3] = torch.nan
    kernel = functools.partial(run, norm=NORMS[norm])
    weights = torch.randn(150, 33), torch.randn(150, 33)
    together = results_of(kernel, tensors, backend, weights)
    part = {**tensors, "x": tensors["x"][131:140], "residual": tensors["residual"][131:140]}
    alone = results_of(kernel, part, backend, tuple(w[131:140] for w in weights))
    for name in ("y", "final_state", "grad_x", "grad_residual"):
        assert torch.equal(together[name][131:140], alone[name]), name
        assert together[name].isnan().any(1).nonzero().flatten().tolist() == [3], name


@pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=pytest.mark.gpu)])
def test_repeats_to_the_bit(backend, results_of, cast):
    tensors, kernel = cast(problem(1000, 70), torch.float32), functools.partial(run, norm=layer_norm)
    first = results_of(kernel, tensors, backend)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = results_of(kernel, tensors, backend)
            assert all(torch.equal(x, again[name]) for name, x in first.items()), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"x must be .*got \(3, 5\) and \(4,\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); expected \(5,\)"),
        ({"residual": torch.zeros(5)}, r"residual is torch.float32 \(5,\); expected torch.float32 \(3, 5\)"),
        ({"residual": torch.zeros(3, 5, dtype=torch.bfloat16)}, r"residual is torch.bfloat16 .*expected torch.float32"),
        ({"backend": "metal"}, "backend='metal' is not one of"),
        ({"backend": "numba", "weight": torch.zeros(5, dtype=torch.float64)}, "'numba' does not take float64"),
    ],
)
def test_bad_input_is_refused(change, message, cast):
    tensors = cast(problem(3, 5), torch.float32)
    with pytest.raises(ValueError, match=message):
        layer_norm(**{**tensors, **change})
