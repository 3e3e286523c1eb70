"""The selective scan: every backend against the reference and its own plain twins. (Official numbers: *_golden.py.)"""

import math
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymamba.kernels import selective_scan, selective_scan_step
from polymamba.kernels.selective_scan import selective_scan_reference

FAST = ["numba", "triton", "cuda"]
ALL = ["reference", "torch", *FAST]
AT_SIZE = [
    pytest.param("numba", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")),
]


def problem(
    batch: int = 1, length: int = 5, channels: int = 5, states: int = 3, groups: int = 1, *,
    static: str = "", absent: str = "", sequences: int | None = None, is_complex: bool = False, seed: int = 1,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Inputs in float64. `static` names those of B and C that do not depend on the input, `absent` what is left out."""
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


def part(tensors: dict[str, Tensor | None], rows: slice, steps: slice, **changed: Tensor) -> dict[str, Tensor | None]:
    """Some rows and steps of a problem; the initial state is left out unless given in `changed`."""
    cut = {
        name: x[rows, steps] if x is not None and x.dim() > 2 and name != "initial_state" else x
        for name, x in tensors.items()
    }
    return {**cut, "initial_state": None, **changed}


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


def settle(options: dict, is_complex: bool = False) -> tuple[dict[str, Tensor | None], dict]:
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
def test_every_option(name, backend, results_of, cast, assert_close):
    tensors, arguments = settle(OPTIONS[name])
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
def test_chunks(name, at_once, walked, results_of, cast, assert_close):
    backend, chunks = walked
    chunks(at_once)
    tensors, arguments = settle(CHUNKED[name])
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    actual = results_of(selective_scan, cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 3e-6, f"{name}, {backend}")


@pytest.mark.parametrize("reverse", [False, True])
def test_who_runs_the_chunks_changes_no_bit(reverse, walked, device_of):
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


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_with_complex_decay(name, results_of, assert_close):
    tensors, arguments = settle(OPTIONS[name], is_complex=True)
    expected = results_of(selective_scan, tensors, "reference", **arguments)
    assert_close(results_of(selective_scan, tensors, "torch", **arguments), expected, 1e-11, name)


@pytest.mark.parametrize("backend", AT_SIZE)
@pytest.mark.parametrize("name", LARGE_OPTIONS)
def test_every_option_at_size(name, backend, device_of, results_of, cast, assert_close):
    tensors, arguments = settle(LARGE_OPTIONS[name])
    expected = results_of(selective_scan, tensors, "torch", device=device_of(backend), **arguments)
    actual = results_of(selective_scan, cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 2e-5, f"{name}, {backend}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["groups", "packed", "static B", "bare"])
def test_complex_decay_on_a_gpu(name, results_of, assert_close):
    tensors, arguments = settle(OPTIONS[name], is_complex=True)
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    assert_close(results_of(selective_scan, tensors, "torch", device="cuda", **arguments), expected, 1e-11, name)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data, results_of, cast, assert_close):
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
    tensors, arguments = settle(options)
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    assert_close(
        results_of(selective_scan, cast(tensors, torch.float32), "numba", **arguments), expected, 2e-5, options
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype, backend, results_of, cast, assert_close):
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
def test_half_precision_at_size(backend, device_of, results_of, cast, assert_close):
    tensors = problem(batch=2, length=2049, channels=300, states=16)
    kept = {"A", "D", "delta_bias", "initial_state"}
    mixed = {name: x.to(torch.float32 if name in kept else torch.bfloat16) for name, x in tensors.items()}
    arguments = {"delta_softplus": True, "return_final_state": True}
    expected = results_of(selective_scan, cast(mixed, torch.float64), "torch", device=device_of(backend), **arguments)
    assert_close(results_of(selective_scan, mixed, backend, **arguments), expected, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("backend", FAST)
def test_step_sizes_from_tiny_to_large(backend, results_of, cast, assert_close):
    """dt from 1e-5 to 20 through softplus: the gradient of delta keeps its digits where dt is small, too."""
    steps = torch.logspace(math.log10(1e-5), math.log10(20), 24, dtype=torch.float64)
    for step in steps.chunk(4):
        tensors = problem(length=len(step), channels=3, absent="z D delta_bias initial_state")
        tensors["delta"] = torch.log(torch.expm1(step))[None, :, None].expand(1, -1, 3).clone()
        arguments = {"delta_softplus": True, "return_final_state": True}
        expected = results_of(selective_scan, tensors, "reference", **arguments)
        assert_close(results_of(selective_scan, cast(tensors, torch.float32), backend, **arguments), expected, 3e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_nan_comes_out_as_nan(name, backend, device_of):
    device = device_of(backend)
    tensors = {k: x.float().to(device) for k, x in problem(length=6).items()}
    tensors[name].select(1, 2).fill_(torch.nan)
    y = selective_scan(**tensors, delta_softplus=True, backend=backend)
    assert y[:, :2].isfinite().all()
    assert y[:, 2].isnan().all()
    assert y[:, 3:].isnan().all() == (name not in ("C", "z"))  # the state carries on what entered it


@pytest.mark.parametrize("backend", FAST)
def test_rows_of_a_larger_tensor(backend, device_of, assert_close):
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


# Against its own plain twins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ALL)
def test_in_pieces_and_step_by_step(backend, device_of, assert_close):
    device = device_of(backend)
    batch, length = 2, 13
    tensors = {k: x.float().to(device) for k, x in problem(batch, length, 6, 3, 2).items()}
    start = tensors["initial_state"]
    arguments = {"delta_softplus": True, "backend": backend}
    y, final = selective_scan(**tensors, **arguments, return_final_state=True)

    state, pieces = start, []
    for first, last in ((0, 5), (5, 6), (6, 6), (6, 13)):
        piece = part(tensors, slice(None), slice(first, last), initial_state=state)
        out, state = selective_scan(**piece, **arguments, return_final_state=True)
        pieces.append(out)
    assert_close({"y": torch.cat(pieces, dim=1), "state": state}, {"y": y, "state": final}, 1e-6, "pieces")

    state = start.clone()
    constant = {name: tensors[name] for name in ("A", "D", "delta_bias")}
    steps = [
        selective_scan_step(
            state, **{k: tensors[k][:, t] for k in ("u", "delta", "B", "C", "z")}, **constant, **arguments
        )
        for t in range(length)
    ]
    assert_close({"y": torch.stack(steps, dim=1), "state": state}, {"y": y, "state": final}, 1e-6, "steps")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("static", ["", "B", "BC"])
def test_step(static, backend, device_of, assert_close):
    """Bare, with static matrices, and on a state that is a view: written in place."""
    device = device_of(backend)
    tensors = problem(batch=3, length=1, channels=37, static=static, absent="z D delta_bias")
    row = {k: x if x is None or x.dim() == 2 or k == "initial_state" else x[:, 0] for k, x in tensors.items()}
    state = row.pop("initial_state")
    expected_state = state.clone()
    expected = selective_scan_step(expected_state, **row, backend="reference")
    view = state.float().to(device).mT.contiguous().mT
    y = selective_scan_step(
        view, **{k: None if x is None else x.float().to(device) for k, x in row.items()}, backend=backend
    )
    assert_close({"y": y.cpu(), "state": view.cpu()}, {"y": expected, "state": expected_state}, 1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_reverse_is_flip_run_flip(backend, results_of, cast, assert_close):
    tensors = cast(problem(batch=2, length=9), torch.float32)
    by_time = ("u", "delta", "B", "C", "z")

    def flipped(**inputs):
        options = {name: inputs.pop(name) for name in ("backend", "delta_softplus", "return_final_state")}
        inputs = {k: x.flip(1) if k in by_time else x for k, x in inputs.items()}
        y, final = selective_scan(**inputs, **options)
        return y.flip(1), final

    arguments = {"delta_softplus": True, "return_final_state": True}
    expected = results_of(flipped, tensors, backend, **arguments)
    actual = results_of(selective_scan, tensors, backend, **arguments, reverse=True)
    assert_close(actual, expected, 1e-6)
    if backend in FAST:
        assert all(torch.equal(x, expected[name]) for name, x in actual.items())


OF_A_ROW = ("y", "final_state", *(f"grad_{name}" for name in ("u", "delta", "B", "C", "z", "initial_state")))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_each_alone(reverse, backend, results_of, cast):
    """To the bit, gradients too: no sequence feels what it is packed with."""
    ends = [0, 5, 5, 71, 74]
    tensors = cast(problem(length=74, sequences=4, channels=3, states=2), torch.float32)
    arguments = {"delta_softplus": True, "return_final_state": True, "reverse": reverse}
    weight = torch.randn(1, 74, 3), torch.randn(4, 3, 2)
    packed = results_of(
        selective_scan, tensors, backend, weight, **arguments, cu_seqlens=torch.tensor(ends, dtype=torch.int32)
    )
    for s, (start, end) in enumerate(pairwise(ends)):
        own, steps = slice(s, s + 1), slice(start, end)
        inputs = part(tensors, slice(None), steps, initial_state=tensors["initial_state"][own])
        alone = results_of(selective_scan, inputs, backend, (weight[0][:, steps], weight[1][own]), **arguments)
        for name in OF_A_ROW:
            of_state = name in ("final_state", "grad_initial_state")
            assert torch.equal(packed[name][own] if of_state else packed[name][:, steps], alone[name]), (s, name)


@pytest.mark.parametrize("backend", FAST)
def test_a_row_does_not_feel_its_batch(backend, results_of, cast):
    tensors = cast(problem(batch=3, length=9, channels=40, states=2), torch.float32)
    arguments = {"delta_softplus": True, "return_final_state": True}
    weight = torch.randn(3, 9, 40), torch.randn(3, 40, 2)
    together = results_of(selective_scan, tensors, backend, weight, **arguments)
    row = slice(1, 2)
    inputs = part(tensors, row, slice(None), initial_state=tensors["initial_state"][row])
    alone = results_of(selective_scan, inputs, backend, tuple(w[row] for w in weight), **arguments)
    for name in OF_A_ROW:
        assert torch.equal(together[name][row], alone[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("states", [1, 16])
def test_a_row_does_not_feel_its_batch_at_size(states, backend, results_of, cast):
    """A batch that fills a GPU, and a row of it, which does not: their plans differ."""
    tensors = cast(problem(batch=24, length=70, channels=2048, states=states), torch.float32)
    arguments = {"delta_softplus": True, "return_final_state": True}
    weight = torch.randn(24, 70, 2048), torch.randn(24, 2048, states)
    together = results_of(selective_scan, tensors, backend, weight, **arguments)
    row = slice(5, 6)
    inputs = part(tensors, row, slice(None), initial_state=tensors["initial_state"][row])
    alone = results_of(selective_scan, inputs, backend, tuple(w[row] for w in weight), **arguments)
    for name in OF_A_ROW:
        assert torch.equal(together[name][row], alone[name]), name


@pytest.mark.parametrize("backend", ["numba", *(pytest.param(x, marks=pytest.mark.gpu) for x in ("triton", "cuda"))])
def test_the_backward_repeats_to_the_bit(backend, results_of, cast):
    """Whatever the timing of blocks, and with any number of threads."""
    tensors = cast(problem(batch=5, length=200, channels=70, states=8), torch.float32)
    arguments = {"delta_softplus": True, "return_final_state": True}
    first = results_of(selective_scan, tensors, backend, **arguments)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = results_of(selective_scan, tensors, backend, **arguments)
            assert all(torch.equal(x, again[name]) for name, x in first.items()), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["numba", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("states", [1, 12, 16])
def test_tensors_may_begin_anywhere(states, backend, results_of, cast):
    """Each of them one number past where its memory begins, and so where fewer numbers can be moved at once."""
    tensors = cast(problem(length=70, channels=36, states=states), torch.float32)
    arguments = {"delta_softplus": True, "return_final_state": True}

    def moved(**given):
        odd = {k: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for k, x in given.items() if k in tensors}
        return selective_scan(**{**given, **odd})

    first = results_of(selective_scan, tensors, backend, **arguments)
    again = results_of(moved, tensors, backend, **arguments)
    assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "states"), [("triton", 1), ("cuda", 4)])
def test_offsets_beyond_32_bits(backend, states):
    """A tensor of 2^31 elements and more: the last row is that of a short problem."""
    length, channels = 2**20 + 3, 2048
    u = torch.zeros(1, length, channels, dtype=torch.bfloat16, device="cuda")
    delta = torch.ones_like(u)
    tail = torch.randn(1, 5, channels, dtype=torch.bfloat16, device="cuda")
    u[:, -5:] = tail
    A = -torch.rand(channels, states, device="cuda") - 0.1
    B = torch.ones(1, length, states, dtype=torch.bfloat16, device="cuda")
    y = selective_scan(u, delta, A, B, B, backend=backend)
    assert torch.equal(y[:, -5:], selective_scan(tail, delta[:, -5:], A, B[:, -5:], B[:, -5:], backend=backend))
    assert not y[:, :-5].any()


# Derivatives of the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
def test_gradcheck(is_complex):
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
    ],
)
def test_bad_input_is_refused(change, message, cast):
    tensors = cast(problem(2, 5, 6, 3, 2), torch.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**tensors, **change})


def test_a_step_needs_groups():
    tensors = problem(batch=2, length=1)
    state = tensors.pop("initial_state")
    row = {k: x[:, 0] if k in ("u", "delta", "z") else x for k, x in tensors.items()}
    with pytest.raises(ValueError, match=r"must be \(B, G, N\).*got \(2, 1, 1, 3\)"):
        selective_scan_step(state, **row)
