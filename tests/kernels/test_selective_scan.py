"""The selective scan: every backend against the reference. (Plain twins: *_twins.py. Official numbers: *_golden.py.)"""

import math
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymamba.kernels import selective_scan, selective_scan_step
from polymamba.kernels.selective_scan import selective_scan_reference

FAST = ["numba", "triton", "cuda"]
AT_SIZE = [
    pytest.param("numba", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")),
]


# Against the reference in float64 -----------------------------------------------------------------------------------

OPTIONS = {
    "one step": {"length": 1},
    "two steps, one state, one channel": {"length": 2, "states": 1, "channels": 1},
    "a step short of a checkpoint": {"length": 63, "channels": 3},
    "just a checkpoint": {"length": 64, "states": 1, "channels": 9},
    "a step past a checkpoint": {"length": 65, "states": 16, "channels": 2},
    "no step": {"length": 0},
    "three rows": {"batch": 3, "length": 6},
    "many states": {"length": 4, "states": 64},
    "many channels": {"length": 4, "channels": 75, "states": 2},
    "groups": {"batch": 2, "length": 6, "channels": 6, "groups": 3},
    "static B": {"batch": 2, "length": 9, "static": "B"},
    "static C": {"batch": 2, "length": 9, "static": "C", "reverse": True},
    "static B and C": {"batch": 2, "length": 9, "static": "BC"},
    "bare": {"length": 9, "absent": "D z delta_bias initial_state"},
    "bare, no softplus": {"length": 9, "absent": "D z delta_bias initial_state", "delta_softplus": False},
    "no z": {"length": 9, "absent": "z"},
    "no D": {"length": 9, "absent": "D"},
    "no softplus": {"length": 9, "delta_softplus": False},
    "reverse": {"batch": 2, "length": 11, "reverse": True},
    "packed": {"cu_seqlens": [0, 0, 7, 8, 8, 21, 21]},
    "packed, reverse, groups": {"cu_seqlens": [0, 9, 9, 14], "reverse": True, "groups": 5},
    "packed, no initial state": {"cu_seqlens": [0, 9, 9, 14], "absent": "initial_state"},
    "packed, static B": {"cu_seqlens": [0, 3, 10], "static": "B"},
    "packed, nothing in it": {"cu_seqlens": [0, 0, 0]},
}
LARGE_OPTIONS = {
    "many of all": {"batch": 3, "length": 2049, "channels": 300, "states": 16, "groups": 2},
    "256 states": {"batch": 2, "length": 130, "channels": 40, "states": 256},
    "256 states, static": {"batch": 2, "length": 70, "channels": 40, "states": 256, "static": "BC"},
    "100 states, reverse": {"batch": 2, "length": 197, "channels": 77, "states": 100, "reverse": True},
    "VMamba": {"batch": 3, "length": 197, "channels": 384, "states": 1, "groups": 4, "absent": "z"},
    "packed": {"cu_seqlens": [0, 1, 1, 700, 764, 1500], "channels": 200, "states": 16},
    "long": {"length": 70_000, "channels": 4, "states": 2},
    "long, reverse, even channels": {"batch": 2, "length": 5000, "channels": 64, "states": 8, "reverse": True},
    "64 states": {"batch": 2, "length": 200, "channels": 48, "states": 64},
    "packed beyond a chunk": {"cu_seqlens": [0, 3000, 3000, 3001, 8200], "channels": 96, "states": 16, "groups": 2},
    "static, even channels": {"batch": 2, "length": 2500, "channels": 64, "states": 16, "static": "BC"},
}  # fmt: skip


def settle(problem: Callable, options: dict, is_complex: bool = False) -> tuple[dict[str, Tensor | None], dict]:
    """(inputs, keyword arguments) from an entry of the tables above."""
    options = dict(options)
    arguments = {"delta_softplus": options.pop("delta_softplus", True), "reverse": options.pop("reverse", False)}
    if "cu_seqlens" in options:
        ends = options.pop("cu_seqlens")
        arguments["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
        options |= {"length": ends[-1], "sequences": len(ends) - 1}
    return problem(**options, is_complex=is_complex), {**arguments, "return_final_state": True}


@pytest.mark.parametrize("backend", ["torch", *FAST])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(problem, name, backend, results_of, cast, assert_close):
    tensors, arguments = settle(problem, OPTIONS[name])
    expected = results_of(selective_scan, tensors, "reference", **arguments)
    exact = backend == "torch"
    actual = results_of(selective_scan, cast(tensors, torch.float64 if exact else torch.float32), backend, **arguments)
    assert_close(actual, expected, 1e-11 if exact else 3e-6, f"{name}, {backend}")


CHUNKED = {  # lengths about chunks of 32 steps, which the Triton kernels are made to take for these tests
    "a step short of a chunk": {"length": 31, "channels": 3},
    "just a chunk": {"length": 32, "channels": 3},
    "a step past a chunk": {"length": 33, "channels": 3, "batch": 2},
    "a step past two chunks, reverse": {"length": 65, "channels": 3, "reverse": True},
    "several chunks, static B and C": {"length": 96, "static": "BC"},
    "several chunks, groups, no z": {"length": 75, "channels": 6, "groups": 3, "states": 1, "absent": "z"},
    "wide tiles": {"length": 37, "channels": 520, "states": 2},
    "no step": {"length": 0},
    "packed": {"cu_seqlens": [0, 0, 31, 63, 96, 161, 161, 162]},
    "packed, reverse, bare": {"cu_seqlens": [0, 40, 40, 75, 140], "reverse": True, "absent": "D z initial_state"},
}


@pytest.fixture(params=["triton", "cuda"])
def walked(request, monkeypatch, device_of):
    """(backend, chunks): `chunks(at_once)` has chunks run all at once or by one program after another. They have 32
    steps in Triton, 64 in CUDA C++: two units, if there is more than one state."""
    device_of(request.param)
    name, threshold = {"triton": ("triton", "_WARPS_A_SM"), "cuda": ("cuda_plan", "_ROWS_A_PROCESSOR")}[request.param]
    module = import_module(f"polymamba.kernels.selective_scan.{name}")
    if request.param == "triton":
        monkeypatch.setattr(module, "CHUNK", 32)
    else:
        monkeypatch.setattr(module, "chunk_and_unit", lambda channels, states: (64, 64 if states == 1 else 32))
    return request.param, lambda at_once: monkeypatch.setattr(module, threshold, 10**9 if at_once else 0)


@pytest.mark.parametrize("at_once", [False, True], ids=["one after another", "all at once"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "wide tiles" else name for name in CHUNKED]
)
def test_chunks(problem, name, at_once, walked, results_of, cast, assert_close):
    backend, chunks = walked
    chunks(at_once)
    tensors, arguments = settle(problem, CHUNKED[name])
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    actual = results_of(selective_scan, cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 3e-6, f"{name}, {backend}")


@pytest.mark.parametrize("reverse", [False, True])
def test_who_runs_the_chunks_changes_no_bit(problem, reverse, walked, device_of):
    backend, chunks = walked
    device = device_of(backend)
    tensors = {k: x.float().to(device) for k, x in problem(batch=1, length=101, channels=40, states=16).items()}
    results = []
    for at_once in (False, True):
        chunks(at_once)
        results.append(
            selective_scan(**tensors, delta_softplus=True, return_final_state=True, reverse=reverse, backend=backend)
        )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_with_complex_decay(problem, name, backend, results_of, cast, assert_close):
    tensors, arguments = settle(problem, OPTIONS[name], is_complex=True)
    expected = results_of(selective_scan, tensors, "reference", **arguments)
    exact = backend == "torch"
    actual = results_of(selective_scan, tensors if exact else cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 1e-11 if exact else 5e-6, f"{name}, {backend}")


SLOWER = {"several chunks, groups, no z", "packed, reverse, bare", "several chunks, static B and C", "wide tiles"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOWER else x for x in CHUNKED])
def test_chunks_of_complex_decay(problem, name, device_of, monkeypatch, results_of, cast, assert_close):
    device_of("triton")
    monkeypatch.setattr(import_module("polymamba.kernels.selective_scan.triton_complex"), "CHUNK", 32)
    tensors, arguments = settle(problem, CHUNKED[name], is_complex=True)
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    assert_close(results_of(selective_scan, cast(tensors, torch.float32), "triton", **arguments), expected, 5e-6, name)


@pytest.mark.parametrize("backend", AT_SIZE)
@pytest.mark.parametrize("name", LARGE_OPTIONS)
def test_every_option_at_size(problem, name, backend, device_of, results_of, cast, assert_close):
    tensors, arguments = settle(problem, LARGE_OPTIONS[name])
    expected = results_of(selective_scan, tensors, "torch", device=device_of(backend), **arguments)
    actual = results_of(selective_scan, cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 2e-5, f"{name}, {backend}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["groups", "packed", "static B", "bare"])
def test_complex_decay_on_a_gpu(problem, name, results_of, assert_close):
    tensors, arguments = settle(problem, OPTIONS[name], is_complex=True)
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    assert_close(results_of(selective_scan, tensors, "torch", device="cuda", **arguments), expected, 1e-11, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE_OPTIONS)
def test_complex_decay_at_size(problem, name, results_of, cast, assert_close):
    tensors, arguments = settle(problem, LARGE_OPTIONS[name], is_complex=True)
    expected = results_of(selective_scan, tensors, "torch", device="cuda", **arguments)
    assert_close(results_of(selective_scan, cast(tensors, torch.float32), "triton", **arguments), expected, 2e-5, name)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(problem, data, results_of, cast, assert_close):
    groups = data.draw(st.integers(1, 3), label="groups")
    options = {
        "batch": data.draw(st.integers(1, 3), label="batch"),
        "length": data.draw(st.integers(0, 140), label="length"),
        "channels": groups * data.draw(st.integers(1, 40), label="channels of a group"),
        "states": data.draw(st.integers(1, 9), label="states"),
        "groups": groups,
        "static": data.draw(st.sampled_from(["", "B", "C", "BC"])),
        "absent": data.draw(st.sampled_from(["", "z", "D z", "delta_bias initial_state"])),
        "reverse": data.draw(st.booleans()),
    }
    tensors, arguments = settle(problem, options)
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    assert_close(
        results_of(selective_scan, cast(tensors, torch.float32), "numba", **arguments), expected, 2e-5, options
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(problem, dtype, backend, results_of, cast, assert_close):
    """Sums stay in float32, so that only the rounding of what is returned is left; parameters stay in float32."""
    tensors = problem(batch=2, length=20, states=4)
    kept = {"A", "D", "delta_bias", "initial_state"}
    mixed = {name: x.to(torch.float32 if name in kept else dtype) for name, x in tensors.items()}
    arguments = {"delta_softplus": True, "return_final_state": True}
    actual = results_of(selective_scan, mixed, backend, **arguments)
    expected = results_of(selective_scan, cast(mixed, torch.float64), "reference", **arguments)
    for name, x in actual.items():
        given = name.removeprefix("grad_")
        assert x.dtype == (mixed[given].dtype if given in mixed else dtype if name == "y" else torch.float32), name
    unit = torch.finfo(dtype).eps
    assert_close(actual, expected, unit)  # half a unit would be rounding at the largest entry
    # In CUDA C++ step sizes of a delta in 16 bits are good to 2e-6.
    assert_close({"final_state": actual["final_state"]}, expected, 3e-6 if backend == "cuda" else 1e-6)


@pytest.mark.parametrize("backend", AT_SIZE)
def test_half_precision_at_size(problem, backend, device_of, results_of, cast, assert_close):
    tensors = problem(batch=2, length=2049, channels=300, states=16)
    kept = {"A", "D", "delta_bias", "initial_state"}
    mixed = {name: x.to(torch.float32 if name in kept else torch.bfloat16) for name, x in tensors.items()}
    arguments = {"delta_softplus": True, "return_final_state": True}
    expected = results_of(selective_scan, cast(mixed, torch.float64), "torch", device=device_of(backend), **arguments)
    assert_close(results_of(selective_scan, mixed, backend, **arguments), expected, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("backend", FAST)
def test_step_sizes_from_tiny_to_large(problem, backend, results_of, cast, assert_close):
    """dt from 1e-5 to 20 through softplus: the gradient of delta keeps its digits where dt is small, too."""
    steps = torch.logspace(math.log10(1e-5), math.log10(20), 24, dtype=torch.float64)
    for step in steps.chunk(4):
        tensors = problem(length=len(step), channels=3, absent="z D delta_bias initial_state")
        tensors["delta"] = torch.log(torch.expm1(step))[None, :, None].expand(1, -1, 3).clone()
        arguments = {"delta_softplus": True, "return_final_state": True}
        expected = results_of(selective_scan, tensors, "reference", **arguments)
        assert_close(results_of(selective_scan, cast(tensors, torch.float32), backend, **arguments), expected, 3e-6)


@pytest.mark.parametrize(("backend", "is_complex"), [*((backend, False) for backend in FAST), ("triton", True)])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_nan_comes_out_as_nan(problem, name, backend, is_complex, device_of, cast):
    device = device_of(backend)
    single = cast(problem(length=6, is_complex=is_complex), torch.float32)
    tensors = {k: x.to(device) for k, x in single.items()}
    tensors[name].select(1, 2).fill_(torch.nan)
    y = selective_scan(**tensors, delta_softplus=True, backend=backend)
    assert y[:, :2].isfinite().all()
    assert y[:, 2].isnan().all()
    assert y[:, 3:].isnan().all() == (name not in ("C", "z"))  # the state carries on what entered it


@pytest.mark.parametrize("backend", FAST)
def test_rows_of_a_larger_tensor(problem, backend, device_of):
    """What projections return: views with a stride between tokens, and a B whose last dimension is not contiguous."""
    device = device_of(backend)
    tensors = {k: x.float().to(device) for k, x in problem(batch=2, length=7, channels=6).items()}
    joined = torch.cat((tensors["u"], tensors["z"], tensors["delta"]), dim=-1)
    views = dict(zip(("u", "z", "delta"), joined.split(6, dim=-1), strict=True))
    views["B"] = tensors["B"].mT.contiguous().mT
    views["C"] = torch.cat((tensors["C"], tensors["B"]), dim=-1)[..., :3]
    views["A"] = tensors["A"].mT.contiguous().mT
    views["initial_state"] = tensors["initial_state"].mT.contiguous().mT
    expected = selective_scan(**tensors, delta_softplus=True, backend=backend)
    actual = selective_scan(**{**tensors, **views}, delta_softplus=True, backend=backend)
    assert torch.equal(actual, expected)


# Derivatives of the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
def test_gradcheck(problem, is_complex):
    """The definition itself, against differences: first and second derivatives."""
    tensors = problem(length=3, channels=2, states=2, is_complex=is_complex)
    names = [name for name, x in tensors.items() if x is not None]
    leaves = [tensors[name].requires_grad_() for name in names]

    def scan(*values):
        inputs = dict(zip(names, values, strict=True))
        return selective_scan_reference(**inputs, delta_softplus=True, return_final_state=True)

    assert torch.autograd.gradcheck(scan, leaves)
    assert torch.autograd.gradgradcheck(scan, leaves)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(5, 6)}, r"u must be .batch, length, channels.*got \(5, 6\)"),
        ({"delta": torch.zeros(2, 4, 6)}, r"delta has shape \(2, 4, 6\); expected \(2, 5, 6\)"),
        ({"A": torch.zeros(7, 3)}, r"A has shape \(7, 3\); expected \(6, 3\)"),
        ({"B": torch.zeros(2, 5, 4, 3), "C": torch.zeros(2, 5, 4, 3)}, r"a divisor of 6 channels; got \[4\]"),
        ({"B": torch.zeros(2, 5, 3, 3)}, r"same number of groups.*got \[2, 3\]"),
        ({"C": torch.zeros(2, 5, 2, 4)}, r"C has shape \(2, 5, 2, 4\); expected .*\(2, 5, 2, 3\)"),
        ({"D": torch.zeros(5)}, r"D has shape \(5,\); expected \(6,\)"),
        ({"initial_state": torch.zeros(1, 6, 3)}, r"initial_state has shape \(1, 6, 3\); expected \(2, 6, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch of 1; got batch 2"),
        ({"B": torch.zeros(2, 5, 2, 3, dtype=torch.complex64)}, "B is complex but A is real"),
        ({"backend": "metal"}, "backend='metal' is not one of reference, torch, plain, numba, triton, cuda"),
        ({"backend": "numba", "A": torch.zeros(6, 3, dtype=torch.complex64)}, "'numba' does not take complex A"),
        ({"backend": "triton", "u": torch.zeros(2, 5, 6, dtype=torch.float64)}, "'triton' does not take float64"),
        (
            {
                "backend": "triton",
                "A": torch.zeros(6, 257, dtype=torch.complex64),
                "B": torch.zeros(6, 257),
                "C": torch.zeros(6, 257),
                "initial_state": None,
            },
            "complex A of at most 256 states, not 257",
        ),
    ],
)
def test_bad_input_is_refused(problem, change, message, cast):
    tensors = cast(problem(2, 5, 6, 3, 2), torch.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**tensors, **change})


def test_a_step_needs_groups(problem):
    tensors = problem(batch=2, length=1)
    state = tensors.pop("initial_state")
    row = {k: x[:, 0] if k in ("u", "delta", "z") else x for k, x in tensors.items()}
    with pytest.raises(ValueError, match=r"must be \(B, G, N\).*got \(2, 1, 1, 3\)"):
        selective_scan_step(state, **row)
