"""The CUDA sources of the scan without a GPU: run on the CPU by an emulator. (Compiled: test_cuda_tiles.py.)"""

from importlib import import_module

import pytest
import torch

from polymamba.kernels import nvrtc, selective_scan

pytest.importorskip("triton")

from polymamba.kernels.mamba_block import Behind, BlockWeights, ScanWeights, mamba_block, mamba_block_and_norm
from polymamba.kernels.selective_scan import cuda, cuda_plan


def inputs(length: int, channels: int, states: int, groups: int, sequences: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "u": normal(1, length, channels), "delta": normal(1, length, channels), "z": normal(1, length, channels),
        "A": -torch.rand(channels, states, generator=generator, dtype=torch.float64) - 0.1,
        "B": normal(1, length, groups, states), "C": normal(1, length, groups, states), "D": normal(channels),
        "delta_bias": normal(channels), "initial_state": normal(sequences, channels, states),
    }  # fmt: skip


CASES = {  # states, channels, groups, ends of sequences, reverse, what is static, what is absent
    "16 states": (16, 34, 1, [0, 75], False, "", ""),
    "several of all": (5, 12, 2, [0, 0, 31, 70, 140], True, "", ""),
    "4 states, static B and C": (4, 7, 1, [0, 40, 75], False, "BC", "z delta_bias"),
    "4 states in pairs": (4, 36, 1, [0, 75], False, "", ""),
    "64 states, static C": (64, 20, 1, [0, 35], True, "C", "D initial_state"),
    "several of 40 states": (40, 6, 1, [0, 33, 34, 130], False, "", ""),
    "one state": (1, 20, 1, [0, 66], False, "", "z"),
    "32 states, static B": (32, 6, 1, [0, 33, 34], False, "B", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_emulated(name, at_once, on_the_cpu, monkeypatch, results_of, cast, assert_close):
    monkeypatch.setattr(cuda_plan, "_ROWS_A_PROCESSOR", 10**9 if at_once else 0)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132 if at_once else 1)
    monkeypatch.setattr(cuda_plan, "_FEW_TERMS", 0 if at_once else 8)
    states, channels, groups, ends, reverse, static, absent = CASES[name]
    tensors = inputs(ends[-1], channels, states, groups, len(ends) - 1)
    tensors |= {m: tensors["A"] * (1.5 if m == "B" else -1.0) for m in static}
    tensors |= dict.fromkeys(absent.split())
    arguments = {
        "delta_softplus": True, "return_final_state": True, "reverse": reverse,
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
    }  # fmt: skip
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    assert_close(results_of(selective_scan, cast(tensors, torch.float32), "cuda", **arguments), expected, 3e-6, name)


@pytest.mark.slow
@pytest.mark.parametrize("states", [1, 4, 16, 40])
def test_neither_the_plan_nor_an_address_changes_a_bit(states, on_the_cpu, forget, monkeypatch, results_of, cast):
    """Few and many rows for a multiprocessor, chunks one after another and at once, units walked by one block and by
    several, and tensors at odd addresses."""
    tensors = cast(inputs(70, 36, states, 1, 1), torch.float32)
    arguments = {"delta_softplus": True, "return_final_state": True}
    first = results_of(selective_scan, tensors, "cuda", **arguments)
    for processors, rows in ((132, 0), (132, 10**9), (1, 10**9), (0.01, 0)):  # of a hundredth any rows are many
        monkeypatch.setattr(nvrtc, "processors", lambda device, n=processors: n)
        monkeypatch.setattr(cuda_plan, "_ROWS_A_PROCESSOR", rows)
        forget()
        again = results_of(selective_scan, tensors, "cuda", **arguments)
        assert all(torch.equal(x, again[name]) for name, x in first.items()), (processors, rows)

    for by in (1, 2):  # elements: by two, pairs of channels may still be moved at once where they lie, and fours not

        def moved(by=by, **given):
            odd = {k: torch.cat((given[k].flatten()[:by], given[k].flatten()))[by:] for k in tensors}
            return selective_scan(**{**given, **{k: x.view(given[k].shape) for k, x in odd.items()}})

        again = results_of(moved, tensors, "cuda", **arguments)
        assert all(torch.equal(x, again[name]) for name, x in first.items()), by


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_four_channels_at_once(dtype, reverse, on_the_cpu, monkeypatch, assert_close):
    """Where rows are many: groups, packed sequences, a last block that is not full, and room for y in a wider matrix,
    at an address where only two may be moved. The bits are those of two at once."""
    monkeypatch.setattr(nvrtc, "processors", lambda device: 0.01)
    monkeypatch.setattr(cuda_plan, "chunk_and_unit", lambda channels, states: (128, 32))  # a sequence is one chunk
    tiles, plain = [], cuda_plan.Plan.lay_out
    monkeypatch.setattr(cuda_plan.Plan, "lay_out", lambda self, tile: tiles.append(tile) or plain(self, tile))
    given = inputs(77, 72, 16, 2, 3)
    rows = {k: given[k][0].to(dtype) for k in ("u", "delta", "z", "B", "C")}
    A, D, bias, first = (given[k].float() for k in ("A", "D", "delta_bias", "initial_state"))
    ends = torch.tensor([0, 30, 31, 77], dtype=torch.int32)
    found = []
    for by, column in ((0, 0), (2, 0), (0, 2), (0, 4)):  # elements that inputs lie further; columns before y's
        moved = {k: torch.cat((x.flatten()[:by], x.flatten()))[by:].view(x.shape) for k, x in rows.items()}
        room = torch.full((77, 80), torch.nan, dtype=dtype)
        at = moved["u"], moved["delta"], A, moved["B"], moved["C"], D, moved["z"], bias, first, ends, 1
        y, final, _ = cuda.forward(*at, True, reverse, True, room[:, column : column + 72])
        assert room[:, :column].isnan().all()
        assert room[:, column + 72 :].isnan().all()
        found.append((y.clone(), final))
    assert [tile.V for tile in tiles] == [4, 2, 2]  # the last call has the first one's plan
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    doubled = [x.double()[None] for x in (rows["u"], rows["delta"])]
    expected, state = selective_scan(
        *doubled, A.double(), rows["B"].double()[None], rows["C"].double()[None], D.double(), rows["z"].double()[None],
        delta_bias=bias.double(), delta_softplus=True, initial_state=first.double(), return_final_state=True,
        cu_seqlens=ends, reverse=reverse, backend="torch",
    )  # fmt: skip
    bound = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2e-6
    assert_close({"y": found[0][0][None]}, {"y": expected}, bound)
    assert_close({"state": found[0][1]}, {"state": state}, 3e-6)


def test_emulated_in_bfloat16(on_the_cpu, results_of, cast, assert_close):
    tensors = inputs(36, 8, 16, 1, 1)
    kept = {"A", "D", "delta_bias", "initial_state"}
    mixed = {name: x.to(torch.float32 if name in kept else torch.bfloat16) for name, x in tensors.items()}
    arguments = {"delta_softplus": True, "return_final_state": True}
    expected = results_of(selective_scan, cast(mixed, torch.float64), "torch", **arguments)
    actual = results_of(selective_scan, mixed, "cuda", **arguments)
    assert_close(actual, expected, torch.finfo(torch.bfloat16).eps)
    assert_close({"final_state": actual["final_state"]}, expected, 1e-6)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2.5e-6), (torch.float32, 5e-7)])
def test_emulated_step_sizes_keep_their_digits(dtype, error, on_the_cpu):
    """dt from 6e-6 to 20: the state after one step from 0, where u and B are 1, is dt itself."""
    delta = torch.linspace(-8, 16, 64).to(dtype)
    bias = torch.full((64,), -4.0)
    bias[32:] = 4.0
    one, A = torch.ones(1, 64, dtype=dtype), torch.full((64, 16), -1.0)
    B = torch.ones(1, 1, 16, dtype=dtype)
    _, state, _ = cuda.forward(one, delta[None], A, B, B, None, None, bias, None, None, 1, True, False, False)
    expected = torch.nn.functional.softplus((delta.float() + bias).double())
    assert expected.min() < 1e-5
    assert expected.max() > 19
    assert ((state[0].double() / expected[:, None] - 1).abs() < error).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize(("channels", "states"), [(10, 3), (7, 16), (12, 1)])
def test_emulated_with_room_for_the_gates_gradient(channels, states, on_the_cpu, cast):
    """It is some columns of a wider matrix; and of an odd number of channels not where rows can be moved in pairs."""
    tensors = cast(inputs(70, channels, states, 1, 1), torch.float32)
    del tensors["initial_state"]
    arguments = [tensors[name] for name in ("u", "delta", "A", "B", "C", "D", "z")]
    flat = [x.flatten(0, 1) if x.dim() > 2 else x for x in arguments]
    dy = torch.randn(70, channels)
    for reverse in (False, True):
        _, _, saved = cuda.forward(*flat, tensors["delta_bias"], None, None, 1, True, reverse, True)
        given = (dy, None, *flat, tensors["delta_bias"], None, None, 1, saved, True, reverse)
        expected = cuda.backward(*given)[6]
        wide = torch.full((70, 2 * channels), torch.nan)
        cuda.backward(*given, wide[:, channels:])
        assert torch.equal(wide[:, channels:], expected)
        assert wide[:, :channels].isnan().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize(("channels", "states"), [(10, 5), (7, 64), (12, 1)])
def test_emulated_in_the_memory_of_inputs(channels, states, on_the_cpu, cast):
    """u's gradient takes dy's memory, that of delta delta's, which is some columns of a wider matrix."""
    tensors = cast(inputs(70, channels, states, 1, 1), torch.float32)
    u, delta, A, B, C, D, z = (
        x.flatten(0, 1) if x.dim() > 2 else x for x in (tensors[name] for name in ("u", "delta", *"ABCDz"))
    )
    dy, bias = torch.randn(70, channels), tensors["delta_bias"]
    for reverse in (False, True):
        _, _, saved = cuda.forward(u, delta, A, B, C, D, z, bias, None, None, 1, True, reverse, True)
        others = A, B, C, D, z, bias, None, None, 1, saved, True, reverse
        expected = cuda.backward(dy, None, u, delta, *others)
        wide, room = torch.full((70, 2 * channels), torch.nan), dy.clone()
        wide[:, :channels] = delta
        found = cuda.backward(room, None, u, wide[:, :channels], *others, du=room, ddelta=wide[:, :channels])
        assert all(map(torch.equal, found[:8], expected[:8]))
        assert torch.equal(room, expected[0])
        assert torch.equal(wide[:, :channels], expected[1])
        assert wide[:, channels:].isnan().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize("channels", [10, 7])
def test_emulated_with_room_for_the_result(channels, on_the_cpu, cast):
    tensors = cast(inputs(70, channels, 3, 1, 1), torch.float32)
    arguments = [tensors[name] for name in ("u", "delta", "A", "B", "C", "D", "z")]
    flat = [x.flatten(0, 1) if x.dim() > 2 else x for x in arguments]
    for reverse in (False, True):
        arguments = (*flat, tensors["delta_bias"], None, None, 1, True, reverse, False)
        expected = cuda.forward(*arguments)[0]
        wide = torch.full((70, 2 * channels), torch.nan)
        y = cuda.forward(*arguments, wide[:, channels:])[0]
        assert torch.equal(y, expected)
        assert torch.equal(wide[:, channels:], expected)
        assert wide[:, :channels].isnan().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize("channels", [10, 7])
def test_block_emulated_in_inference(channels, on_the_cpu):
    """There the last product adds up the directions, whose results lie side by side."""
    states, rank, width = 3, 2, 6
    shapes = (channels, 1, 4), (channels,), (rank + 2 * states, channels), (channels, rank), (channels,)
    shapes = *shapes, (channels, states), (channels,)
    scans = tuple(ScanWeights(*(torch.randn(shape) / 2 for shape in shapes)) for _ in range(2))
    weights = BlockWeights(torch.randn(2 * channels, width), torch.randn(width, channels), scans)
    hidden = torch.randn(2, 9, width)
    options = {"dtype": torch.float32, "reverse": (False, True), "scale": 0.5, "backend": "cuda"}
    trained = mamba_block(hidden.clone().requires_grad_(), weights, **options)
    torch.testing.assert_close(mamba_block(hidden, weights, **options), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize(("channels", "width"), [(10, 6), (35, 24), (130, 40)])
def test_block_emulated_with_what_comes_behind(channels, width, on_the_cpu):
    """Against the block and the norm, one after the other, in float32."""
    states, rank = 3, 2
    shapes = (channels, 1, 4), (channels,), (rank + 2 * states, channels), (channels, rank), (channels,)
    shapes = *shapes, (channels, states), (channels,)
    scans = tuple(ScanWeights(*((torch.randn(shape) / 4).bfloat16() for shape in shapes)) for _ in range(2))
    outer = (torch.randn(shape).bfloat16() / shape[1] ** 0.5 for shape in ((2 * channels, width), (width, channels)))
    weights = BlockWeights(*outer, scans)
    hidden, stream = torch.randn(2, 35, width).bfloat16(), torch.randn(2, 35, width)
    norm = torch.rand(width).bfloat16() + 0.5
    options = {"reverse": (False, True), "scale": 0.5}
    with torch.no_grad():
        found = mamba_block_and_norm(
            hidden, weights, Behind(stream, norm, 1e-3), dtype=torch.bfloat16, backend="cuda", **options
        )
        assert found is not None
        wide = BlockWeights(
            *(w.float() for w in weights[:2]), tuple(ScanWeights(*(w.float() for w in s)) for s in scans)
        )
        block = mamba_block(hidden.float(), wide, dtype=torch.float32, backend="numba", **options)
    normed, total = found
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(total, stream + block, rtol=0, atol=4e-2 * float(block.abs().max()))
    expected = torch.nn.functional.rms_norm(total, (width,), norm.float(), 1e-3)
    torch.testing.assert_close(normed.float(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize(("runs", "projected"), [("cuda", True), ("cuda", False), ("triton in its place", True)])
def test_block_emulated_in_training(runs, projected, on_the_cpu, monkeypatch, assert_close):
    """Gradients take the memory of what they are made of, and of no more: the graph may be gone through twice."""
    if runs != "cuda":
        monkeypatch.setattr(cuda, "usable", lambda device: False)
    channels, states, rank, width = 10, 3, 2, 6
    shapes = (channels, 1, 4), (channels,), (rank + 2 * states, channels), (channels, rank), (channels,)
    shapes = *shapes, (channels, states), (channels,)
    scans = tuple(ScanWeights(*((torch.randn(shape) / 2).requires_grad_() for shape in shapes)) for _ in range(2))
    outer = [torch.randn(shape).requires_grad_() for shape in ((2 * channels, width), (width, channels))]
    weights = BlockWeights(*(outer if projected else (None, None)), scans)
    hidden = torch.randn(2, 9, width if projected else 2 * channels, requires_grad=True)
    leaves = [hidden, *(outer if projected else []), *(w for scan in scans for w in scan)]
    dout = torch.randn(2, 9, width if projected else channels)
    given, found = dout.clone(), {}
    for backend in ("cuda", "numba"):
        y = mamba_block(hidden, weights, dtype=torch.float32, reverse=(False, True), backend=backend)
        found[backend] = torch.autograd.grad(y, leaves, dout, retain_graph=True)
        assert all(map(torch.equal, found[backend], torch.autograd.grad(y, leaves, dout)))
    ours, numba_s = ({str(i): x for i, x in enumerate(gradients)} for gradients in found.values())
    assert_close(ours, numba_s, 1e-5)
    assert torch.equal(dout, given)


def test_without_nvrtc_triton_runs_and_a_warning_says_so_once(monkeypatch, forget):
    monkeypatch.setattr(nvrtc, "EMULATED", True)
    monkeypatch.setattr(cuda, "usable", lambda device: device not in cuda._broken)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 1)
    monkeypatch.setattr(cuda_plan, "_room", lambda device: 2**18)
    monkeypatch.setattr(cuda, "_broken", set())
    monkeypatch.setitem(import_module("polymamba.kernels.backends").INSTALLED, "cuda", True)

    def refuse(source, name, device):
        raise nvrtc.Unavailable("no such library")

    monkeypatch.setattr(nvrtc, "kernel", refuse)
    forget()
    tensors = {name: x.float() for name, x in inputs(9, 6, 4, 1, 1).items()}
    expected = selective_scan(**tensors, delta_softplus=True, backend="reference")
    with pytest.warns(RuntimeWarning, match="runs in Triton, which is slower: no such library"):
        y = selective_scan(**tensors, delta_softplus=True, backend="cuda")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(selective_scan(**tensors, delta_softplus=True, backend="cuda"), y)  # a warning would raise
