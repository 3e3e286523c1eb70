"""The causal convolution: every backend against the reference, and against its own plain twins."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymamba.kernels import causal_conv1d, causal_conv1d_step
from polymamba.kernels.causal_conv1d import causal_conv1d_reference
from polymamba.kernels.causal_conv1d.interface import implementation

FAST = ["numba", "triton"]
ALL = ["reference", "torch", *FAST]
AT_SIZE = [pytest.param("numba", marks=pytest.mark.slow), pytest.param("triton", marks=pytest.mark.gpu)]


def problem(
    batch: int = 1, length: int = 9, channels: int = 5, width: int = 4, *,
    absent: str = "", sequences: int | None = None,
) -> dict[str, Tensor | None]:  # fmt: skip
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": normal(batch, length, channels),
        "weight": normal(channels, width),
        "bias": normal(channels),
        "initial_state": normal(batch if sequences is None else sequences, channels, width - 1),
    }
    return {name: None if name in absent.split() else x for name, x in tensors.items()}


OPTIONS = {
    "no step": {"length": 0},
    "shorter than the window": {"batch": 2, "length": 2},
    "a piece and a bit": {"length": 66, "channels": 3},
    "two pieces": {"length": 128, "channels": 2, "width": 3},
    "many channels": {"length": 5, "channels": 150},
    "width 1": {"width": 1},
    "width 2": {"width": 2},
    "width 8": {"width": 8},
    "no activation": {"activation": None},
    "bare": {"absent": "bias initial_state"},
    "reverse": {"batch": 2, "reverse": True},
    "reverse, shorter than the window": {"length": 2, "reverse": True},
    "packed": {"cu_seqlens": [0, 0, 2, 3, 3, 70, 70]},
    "packed, reverse": {"cu_seqlens": [0, 65, 65, 67], "reverse": True},
    "packed, no initial state": {"cu_seqlens": [0, 9, 9, 14], "absent": "initial_state"},
    "packed, nothing in it": {"cu_seqlens": [0, 0, 0]},
}
LARGE_OPTIONS = {
    "odd": {"batch": 3, "length": 2049, "channels": 300},
    "long": {"length": 70_000, "channels": 3, "reverse": True},
    "packed": {"cu_seqlens": [0, 1, 1, 700, 764, 4500], "channels": 201},
}


def settle(options: dict) -> tuple[dict[str, Tensor | None], dict]:
    """(inputs, keyword arguments) from an entry of the tables above."""
    options = dict(options)
    arguments = {"activation": options.pop("activation", "silu"), "reverse": options.pop("reverse", False)}
    if "cu_seqlens" in options:
        ends = options.pop("cu_seqlens")
        arguments["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
        options |= {"length": ends[-1], "sequences": len(ends) - 1}
    return problem(**options), {**arguments, "return_final_state": True}


def test_the_reference_is_torchs_convolution():
    x, weight, bias = (problem(batch=2)[name] for name in ("x", "weight", "bias"))
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=5).mT
    torch.testing.assert_close(causal_conv1d_reference(x, weight, bias, activation=None), expected)
    torch.testing.assert_close(causal_conv1d_reference(x, weight, bias), F.silu(expected))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, backend, results_of, cast, assert_close):
    tensors, arguments = settle(OPTIONS[name])
    expected = results_of(causal_conv1d, tensors, "reference", **arguments)
    actual = results_of(causal_conv1d, cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 2e-6, f"{name}, {backend}")


@pytest.mark.parametrize("backend", AT_SIZE)
@pytest.mark.parametrize("name", LARGE_OPTIONS)
def test_every_option_at_size(name, backend, device_of, results_of, cast, assert_close):
    tensors, arguments = settle(LARGE_OPTIONS[name])
    expected = results_of(causal_conv1d, tensors, "reference", device=device_of(backend), **arguments)
    actual = results_of(causal_conv1d, cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 5e-6, f"{name}, {backend}")


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data, results_of, cast, assert_close):
    options = {
        "batch": data.draw(st.integers(1, 3), label="batch"),
        "length": data.draw(st.integers(0, 300), label="length"),
        "channels": data.draw(st.integers(1, 70), label="channels"),
        "width": data.draw(st.integers(1, 9), label="width"),
        "absent": data.draw(st.sampled_from(["", "bias", "initial_state"])),
        "reverse": data.draw(st.booleans()),
    }
    tensors, arguments = settle(options)
    expected = results_of(causal_conv1d, tensors, "reference", **arguments)
    assert_close(results_of(causal_conv1d, cast(tensors, torch.float32), "numba", **arguments), expected, 1e-5, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width", "ends"),
    [(2, 70, 10, 4, None), (1, 9, 130, 1, None), (1, 40, 7, 3, [0, 1, 1, 37, 40]), (2, 0, 5, 4, None)],
)
def test_both_ways_by_one_kernel_are_the_two_apart(batch, length, channels, width, ends, dtype, device_of):
    device = device_of("triton")
    both_ways, forward = (implementation("triton", name) for name in ("both_ways", "forward"))
    wide = torch.randn(batch * length, 2 * channels, dtype=dtype, device=device)
    x, cu_seqlens = wide[:, channels:], None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)
    (w_1, w_2), bias = torch.randn(2, channels, width, device=device), torch.randn(channels, device=device)
    y_1, y_2 = both_ways(x, w_1, bias, w_2, None, cu_seqlens, batch, True)
    assert torch.equal(y_1, forward(x, w_1, bias, None, cu_seqlens, batch, True, False))
    assert torch.equal(y_2, forward(x, w_2, None, None, cu_seqlens, batch, True, True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype, backend, results_of, cast, assert_close):
    mixed = cast(problem(batch=2), torch.float32) | {"x": problem(batch=2)["x"].to(dtype)}
    actual = results_of(causal_conv1d, mixed, backend)
    assert {name: x.dtype for name, x in actual.items() if x.dtype != torch.float32} == {"y": dtype, "grad_x": dtype}
    expected = results_of(causal_conv1d, cast(mixed, torch.float64), "reference")
    assert_close(actual, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", FAST)
def test_nan_comes_out_as_nan(backend, device_of):
    device = device_of(backend)
    tensors = {k: x.float().to(device) for k, x in problem().items()}
    tensors["x"][:, 2] = torch.nan
    y = causal_conv1d(**tensors, backend=backend)
    assert y.isnan().all(dim=(0, 2)).tolist() == [2 <= t < 6 for t in range(9)]
    assert y[:, :2].isfinite().all()
    assert y[:, 6:].isfinite().all()


@pytest.mark.parametrize("backend", ALL)
def test_in_pieces_and_step_by_step(backend, device_of, assert_close):
    device = device_of(backend)
    tensors = {k: x.float().to(device) for k, x in problem(batch=2, length=11).items()}
    x, start = tensors.pop("x"), tensors.pop("initial_state")
    y, final = causal_conv1d(x, **tensors, initial_state=start, return_final_state=True, backend=backend)

    state, pieces = start, []
    for piece in x.split([5, 1, 2, 0, 3], dim=1):
        out, state = causal_conv1d(piece, **tensors, initial_state=state, return_final_state=True, backend=backend)
        pieces.append(out)
    assert torch.equal(state, final)
    assert_close({"y": torch.cat(pieces, dim=1)}, {"y": y}, 1e-6, "pieces")

    state = start.clone()
    steps = [causal_conv1d_step(state, row, **tensors, backend=backend) for row in x.unbind(1)]
    assert torch.equal(state, final)
    assert_close({"y": torch.stack(steps, dim=1)}, {"y": y}, 1e-6, "steps")


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_step(width, backend, device_of, assert_close):
    """No bias, no activation, many channels, a row and a state that are views: the state is written in place."""
    device = device_of(backend)
    tensors = problem(batch=3, length=2, channels=140, width=width)
    row, weight, state = tensors["x"][:, 1], tensors["weight"], tensors["initial_state"]
    expected_state = state.clone()
    expected = causal_conv1d_step(expected_state, row, weight, activation=None, backend="reference")
    view = state.float().to(device).mT.contiguous().mT
    row = tensors["x"].float().to(device)[:, 1]
    y = causal_conv1d_step(view, row, weight.float().to(device), activation=None, backend=backend)
    assert_close({"y": y.cpu(), "state": view.cpu()}, {"y": expected, "state": expected_state}, 1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_reverse_is_flip_run_flip(backend, results_of, cast, assert_close):
    tensors = cast(problem(batch=2, length=70, channels=2), torch.float32)

    def flipped(x, initial_state, **inputs):
        y, final = causal_conv1d(x.flip(1), initial_state=initial_state, **inputs)
        return y.flip(1), final

    expected = results_of(flipped, tensors, backend, return_final_state=True)
    actual = results_of(causal_conv1d, tensors, backend, return_final_state=True, reverse=True)
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_each_alone(reverse, backend, results_of, cast):
    """To the bit, gradients too."""
    ends = [0, 5, 5, 71, 74]
    tensors = cast(problem(length=74, sequences=4, channels=3), torch.float32)
    arguments = {"return_final_state": True, "reverse": reverse}
    weight = torch.randn(1, 74, 3), torch.randn(4, 3, 3)
    packed = results_of(
        causal_conv1d, tensors, backend, weight, **arguments, cu_seqlens=torch.tensor(ends, dtype=torch.int32)
    )
    for s, (start, end) in enumerate(pairwise(ends)):
        own, steps = slice(s, s + 1), slice(start, end)
        inputs = {**tensors, "x": tensors["x"][:, steps], "initial_state": tensors["initial_state"][own]}
        alone = results_of(causal_conv1d, inputs, backend, (weight[0][:, steps], weight[1][own]), **arguments)
        for name in ("y", "grad_x"):
            assert torch.equal(packed[name][:, steps], alone[name]), (s, name)
        for name in ("final_state", "grad_initial_state"):
            assert torch.equal(packed[name][own], alone[name]), (s, name)


@pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=pytest.mark.gpu)])
def test_the_backward_repeats_to_the_bit(backend, results_of, cast):
    tensors = cast(problem(batch=5, length=1000, channels=70), torch.float32)
    first = results_of(causal_conv1d, tensors, backend, return_final_state=True)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = results_of(causal_conv1d, tensors, backend, return_final_state=True)
            assert all(torch.equal(x, again[name]) for name, x in first.items()), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 5)}, r"x must be .batch, length, channels.*got \(9, 5\)"),
        ({"weight": torch.zeros(4, 4)}, r"weight .channels, width.; got \(2, 9, 5\) and \(4, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); expected \(5,\)"),
        ({"activation": "gelu"}, "activation='gelu' is not 'silu' or None"),
        ({"initial_state": torch.zeros(2, 5, 4)}, r"initial_state has shape \(2, 5, 4\); expected \(2, 5, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "batch of 1; got batch 2"),
        ({"backend": "metal"}, "backend='metal' is not one of reference, torch, plain, numba, triton"),
        ({"backend": "numba", "x": torch.zeros(2, 9, 5, dtype=torch.float64)}, "'numba' does not take float64"),
    ],
)
def test_bad_input_is_refused(change, message, cast):
    tensors = cast(problem(batch=2), torch.float32)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**tensors, **change})
