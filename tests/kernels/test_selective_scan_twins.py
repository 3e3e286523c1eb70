"""The selective scan against plain twins of its own: pieces, steps, rows, batches, once more; mostly to the bit."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from polymamba.kernels import selective_scan, selective_scan_step

FAST = ["numba", "triton", "cuda"]
ALL = ["reference", "torch", *FAST]


def part(tensors: dict[str, Tensor | None], rows: slice, steps: slice, **changed: Tensor) -> dict[str, Tensor | None]:
    """Some rows and steps of a problem; the initial state is left out unless given in `changed`."""
    cut = {
        name: x[rows, steps] if x is not None and x.dim() > 2 and name != "initial_state" else x
        for name, x in tensors.items()
    }
    return {**cut, "initial_state": None, **changed}


@pytest.mark.parametrize("backend", ALL)
def test_in_pieces_and_step_by_step(problem, backend, device_of, assert_close):
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
def test_step(problem, static, backend, device_of, assert_close):
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
def test_reverse_is_flip_run_flip(problem, backend, results_of, cast, assert_close):
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
def test_packed_is_each_alone(problem, reverse, backend, results_of, cast):
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


@pytest.fixture
def row_is_alone(problem, results_of, cast):
    """Has a row of a batch compared with itself alone, to the bit."""

    def compared(backend: str, row: slice, batch: int, length: int, channels: int, states: int) -> None:
        tensors = cast(problem(batch=batch, length=length, channels=channels, states=states), torch.float32)
        arguments = {"delta_softplus": True, "return_final_state": True}
        weight = torch.randn(batch, length, channels), torch.randn(batch, channels, states)
        together = results_of(selective_scan, tensors, backend, weight, **arguments)
        inputs = part(tensors, row, slice(None), initial_state=tensors["initial_state"][row])
        alone = results_of(selective_scan, inputs, backend, tuple(w[row] for w in weight), **arguments)
        for name in OF_A_ROW:
            assert torch.equal(together[name][row], alone[name]), name

    return compared


@pytest.mark.parametrize("backend", FAST)
def test_a_row_does_not_feel_its_batch(backend, row_is_alone):
    row_is_alone(backend, slice(1, 2), batch=3, length=9, channels=40, states=2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("states", [1, 16])
def test_a_row_does_not_feel_its_batch_at_size(states, backend, row_is_alone):
    """A batch that fills a GPU, and a row of it, which does not: their plans differ."""
    row_is_alone(backend, slice(5, 6), batch=24, length=70, channels=2048, states=states)


@pytest.mark.parametrize("backend", ["numba", *(pytest.param(x, marks=pytest.mark.gpu) for x in ("triton", "cuda"))])
def test_the_backward_repeats_to_the_bit(problem, backend, results_of, cast):
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
def test_tensors_may_begin_anywhere(problem, states, backend, results_of, cast):
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
