"""The block as one operation of autograd: every backend against its parts by the references, in float64."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from polymamba.kernels import causal_conv1d, layer_norm, rms_norm, selective_scan
from polymamba.kernels.mamba_block import (
    BlockWeights,
    Front,
    ScanWeights,
    mamba_block,
    mamba_block_onwards,
    norm_and_mamba_block,
    serves,
)
from polymamba.kernels.unchanged import unchanged

BACKENDS = ["numba", "triton"]


def problem(
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


def weights_of(tensors: dict[str, Tensor | None]) -> BlockWeights:
    names = [ScanWeights._fields, [f"{name}2" for name in ScanWeights._fields]]
    scans = tuple(ScanWeights(*(tensors.get(name) for name in own)) for own in names if own[0] in tensors)
    return BlockWeights(tensors.get("in_proj"), tensors.get("out_proj"), scans)


def run(
    hidden: Tensor, *, backend: str, cu_seqlens: Tensor | None = None, reverse: tuple[bool, ...] = (False,),
    scale: float = 1.0, **weights: Tensor | None,
) -> Tensor:  # fmt: skip
    w = weights_of(weights)
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


OPTIONS = {
    "whole": {},
    "no step": {"length": 0},
    "odd channels, long": {"batch": 1, "length": 70, "channels": 7},
    "between the projections": {"absent": "in_proj out_proj"},
    "no biases": {"absent": "conv_bias dt_bias"},
    "one state, no taps before": {"states": 1, "taps": 1},
    "reverse": {"reverse": (True,)},
    "packed": {"batch": 1, "length": 12, "ends": [0, 5, 5, 12]},
    "packed, reverse, between the projections": {
        "batch": 1, "length": 12, "ends": [0, 1, 12], "reverse": (True,), "absent": "in_proj out_proj",
    },
    "both ways, their mean": {"scans": 2, "reverse": (False, True), "scale": 0.5},
    "both ways, packed, no biases": {
        "scans": 2, "reverse": (False, True), "batch": 1, "length": 12, "ends": [0, 5, 12],
        "absent": "conv_bias dt_bias",
    },
    "both ways, between the projections": {"scans": 2, "reverse": (True, False), "absent": "in_proj out_proj"},
}  # fmt: skip


def settle(options: dict):
    options = dict(options)
    arguments = {name: options.pop(name) for name in ("reverse", "scale") if name in options}
    ends = options.pop("ends", None)
    if ends:
        arguments["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    return problem(**options), arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, backend, results_of, cast, assert_close):
    tensors, arguments = settle(OPTIONS[name])
    expected = results_of(run, tensors, "reference", **arguments)
    actual = results_of(run, cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 5e-6, f"{name}, {backend}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_cuda(name, results_of, cast, assert_close):
    tensors, arguments = settle(OPTIONS[name])
    expected = results_of(run, tensors, "reference", device="cuda", **arguments)
    actual = results_of(run, cast(tensors, torch.float32), "cuda", **arguments)
    assert_close(actual, expected, 5e-6, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_size(dtype, results_of, cast, assert_close):
    """Gradients of a usual shape; of weights in float32, as under autocast."""
    tensors = problem(3, 1025, 200, 402, 16, 13)
    tensors = cast(tensors, torch.float32) | {"hidden": tensors["hidden"].to(dtype)}
    expected = results_of(run, cast(tensors, torch.float64), "reference", device="cuda")
    actual = results_of(run, tensors, "cuda")
    assert_close(actual, expected, 2e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_with_weights_in_float32(backend, results_of, cast, assert_close):
    tensors = cast(problem(scans=2), torch.float32)
    tensors["hidden"] = tensors["hidden"].bfloat16()
    both = {"reverse": (False, True)}
    actual = results_of(run, tensors, backend, **both)
    half = {name for name, x in actual.items() if x.dtype == torch.bfloat16}
    assert half == {"y", "grad_hidden"}
    assert_close(actual, results_of(run, cast(tensors, torch.float64), "reference", **both), 4e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "channels", "rank", "states"), [(70, 130, 12, 16), (1, 7, 3, 5), (65, 64, 1, 1)])
def test_products_of_an_odd_rank(tokens, channels, rank, states, dtype, device_of, assert_close):
    device = device_of("triton")
    kernel = import_module("polymamba.kernels.mamba_block.triton_low_rank")
    u = torch.randn(tokens, 2 * channels, device=device).to(dtype)[:, :channels]
    x_proj = (torch.randn(rank + 2 * states, channels, device=device) / channels**0.5).to(dtype)
    dt_proj = torch.randn(channels, rank, device=device).to(dtype)
    assert kernel.serves(u, rank, len(x_proj))
    low, delta = kernel.low_rank(u, x_proj, dt_proj)
    exact = u.double() @ x_proj.double().T
    assert_close({"low": low}, {"low": exact}, torch.finfo(dtype).eps)
    # delta is of t as it was rounded.
    assert_close({"delta": delta}, {"delta": low[:, :rank].double() @ dt_proj.double().T}, torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("scans", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_as_a_graph_it_is_the_same(dtype, scans, cast):
    """There the directions are branches, which run side by side, and what is made of small weights alone is one."""
    tensors = {
        k: None if x is None else x.cuda() for k, x in cast(problem(3, 200, 40, 80, 16, 5, scans=scans), dtype).items()
    }
    hidden, weights = tensors.pop("hidden"), weights_of(tensors)
    options = {"dtype": dtype, "reverse": (False, True)[:scans], "scale": 0.5, "backend": "cuda"}
    with torch.no_grad():
        expected = mamba_block(hidden, weights, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mamba_block(mamba_block(hidden, weights, **options), weights, **options)
        for _ in range(3):
            graph.replay()
        assert torch.equal(y, mamba_block(expected, weights, **options))


@pytest.mark.parametrize("trained", ["hidden", "in_proj", "x_proj", "dt_proj A_log", "conv D2", "out_proj", "x_proj2"])
def test_only_what_is_trained_has_a_gradient(trained, cast):
    """And the gradients are those of training all, to the bit."""
    tensors = cast(problem(scans=2), torch.float32)
    gradients = []
    for names in (trained.split(), list(tensors)):
        leaves = {name: x.clone().requires_grad_(name in names) for name, x in tensors.items()}
        run(**leaves, backend="numba", reverse=(False, True)).square().sum().backward()
        gradients.append({name: x.grad for name, x in leaves.items()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (name not in trained.split()), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("backend", ["numba", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_repeats_to_the_bit(backend, results_of, cast):
    tensors = cast(problem(3, 300, 40, 80), torch.float32)
    first, again = (results_of(run, tensors, backend) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("retained", [False, True])
def test_what_was_saved_is_released_in_the_backward(retained, cast, monkeypatch):
    """Unless the graph is retained: then it may be gone through again, to the same bits."""
    tensors = {name: x.requires_grad_() for name, x in cast(problem(), torch.float32).items()}
    read, alive, scan = [], [], import_module("polymamba.kernels.selective_scan.cpu")
    run_backward = scan.backward

    def backward(*args, **options):
        alive.append([not x.expired() for x in read])
        return run_backward(*args, **options)

    def unpack(x: list[Tensor]) -> Tensor:
        read.append(StorageWeakRef(x[0].untyped_storage()))
        return x[0]

    monkeypatch.setattr(scan, "backward", backward)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: [x.clone()], unpack):
        y = run(**tensors, backend="numba")
    first = torch.autograd.grad(y.sum(), list(tensors.values()), retain_graph=retained)
    assert alive[0][:3] == [True, True, retained]  # hidden, (x, z), y: in the order in which they were saved
    if retained:
        again = torch.autograd.grad(y.sum(), list(tensors.values()))
        assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


def test_what_it_does_not_do(cast):
    tensors = cast(problem(), torch.float32)
    hidden = tensors.pop("hidden").requires_grad_()
    (gradient,) = torch.autograd.grad(run(hidden, **tensors, backend="numba").sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(ValueError, match=r"runs on numba, triton or cuda, which do not serve torch\.float64"):
        mamba_block(hidden, weights_of(tensors), dtype=torch.float64)
    weights = weights_of(tensors)
    assert serves(hidden, weights, torch.float32)
    assert not serves(hidden.double(), weights, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_it_is_the_same(backend, cast):
    tensors = cast(problem(scans=2), torch.float32)
    options = {"backend": backend, "reverse": (False, True), "scale": 0.5}
    trained = run(**(tensors | {"hidden": tensors["hidden"].requires_grad_()}), **options)
    with torch.no_grad():
        plain = run(**tensors, **options)
    assert plain.grad_fn is None
    assert trained.grad_fn is not None
    assert torch.equal(plain, trained)


@pytest.fixture
def two_processors(monkeypatch):
    """Of a kind that the block with its norm is for; short sequences are, too."""
    if not import_module("polymamba.kernels.numba_lanes").AVX512:
        pytest.skip("for a CPU with AVX-512")
    monkeypatch.setattr("polymamba.kernels.mamba_block.cpu.SHORTEST", 1)
    monkeypatch.setattr("polymamba.kernels.mamba_block.cpu._processors", lambda: 2)


BEHIND_A_NORM = {
    "usual": {"length": 401, "channels": 128, "states": 16, "rank": 4},
    "odd": {"batch": 4, "length": 97, "channels": 75, "states": 3, "rank": 5, "width": 128},
    "one step": {"length": 1, "channels": 64, "states": 1, "rank": 1},
    "no taps before, no biases": {"length": 33, "taps": 1, "channels": 20, "absent": "conv_bias dt_bias"},
    "more taps than steps": {"length": 2, "taps": 5, "channels": 20},
}


def in_double(x: Tensor, stream: Tensor | None, front: Front, weights: BlockWeights):
    """(out, the new stream), by the parts."""
    if front.bias is None:
        normed, stream = rms_norm(x, front.weight, front.eps, residual=stream)
    else:
        normed, stream = layer_norm(x, front.weight, front.bias, front.eps, residual=stream)
    return run(normed, backend="reference", **weights._asdict() | weights.scans[0]._asdict()), stream


@pytest.mark.parametrize("behind", ["start", "stream", "stream, layer norm"])
@pytest.mark.parametrize("name", BEHIND_A_NORM)
def test_with_the_norm_before_it(name, behind, cast, assert_close, two_processors):
    tensors = problem(**{"width": 64} | BEHIND_A_NORM[name])
    x = tensors.pop("hidden")
    generator = torch.Generator().manual_seed(3)
    stream, weight, bias = (torch.randn(s, generator=generator, dtype=x.dtype) for s in (x.shape, *[x.shape[-1:]] * 2))
    inputs = {"x": x, "stream": stream if "stream" in behind else None, "weight": weight}
    inputs["bias"] = bias if "layer" in behind else None

    def tensors_of(dtype: torch.dtype):
        own = cast(inputs, dtype)
        w = weights_of(cast(tensors, dtype))
        return own["x"], own["stream"], Front(own["weight"], own["bias"], 1e-5), w

    out, stream = in_double(*tensors_of(torch.float64))
    found = norm_and_mamba_block(*tensors_of(torch.float32), dtype=torch.float32)
    assert found is not None
    assert_close({"out": found[0], "stream": found[1]}, {"out": out, "stream": stream}, 2e-6, name)
    # In two parts, the second from where the first has ended: to the bit, and so is the state.
    x, stream, front, w = tensors_of(torch.float32)
    cut, state, parts = x.shape[1] // 3, (None, None), []
    for part in (slice(None, cut), slice(cut, None)):
        if x[:, part].numel():
            at = None if stream is None else stream[:, part]
            out, _, *state = norm_and_mamba_block(x[:, part], at, front, w, *state, dtype=torch.float32)
            parts.append(out)
    assert torch.equal(torch.cat(parts, 1), found[0])
    normed = F.layer_norm if front.bias is not None else F.rms_norm
    hidden = normed(x if stream is None else x + stream, x.shape[-1:], *front[: 1 + (front.bias is not None)], eps=1e-5)
    _, *expected = mamba_block_onwards(hidden, w, None, None, dtype=torch.float32, backend="numba")
    for ours, theirs, again in zip(found[2:], expected, state, strict=True):
        assert_close({"state": ours}, {"state": theirs.double()}, 5e-6, name)
        assert torch.equal(ours, again)


def test_with_the_norm_before_it_a_sequence_is_itself(cast, two_processors):
    """To the bit, whatever its batch mates are and however many, and however many threads there are."""
    tensors = cast(problem(8, 120, 64, 128, 16, 4), torch.float32)
    x, front = tensors.pop("hidden"), Front(torch.rand(64), None, 1e-5)
    w = weights_of(tensors)
    whole = norm_and_mamba_block(x, None, front, w, dtype=torch.float32)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, whole, norm_and_mamba_block(x, None, front, w, dtype=torch.float32)))
    finally:
        torch.set_num_threads(n_threads)
    pair = norm_and_mamba_block(x[[5, 2]], None, front, w, dtype=torch.float32)
    assert all(torch.equal(a[[5, 2]], b) for a, b in zip(whole, pair, strict=True))


def test_a_few_tokens_where_the_weights_lie_ready(cast, monkeypatch):
    """One sequence for a processor at most. What is kept is each block's weights as they were, and of no other call."""
    if not import_module("polymamba.kernels.numba_lanes").AVX512:
        pytest.skip("for a CPU with AVX-512")
    monkeypatch.setattr("polymamba.kernels.mamba_block.cpu._processors", lambda: 2)
    tensors = cast(problem(3, 9, 64, 128, 16, 4), torch.float32)
    x, w = tensors.pop("hidden"), weights_of(tensors)
    other = weights_of({name: 1.5 * t for name, t in tensors.items()})
    plain, centred = Front(torch.rand(64), None, 1e-5), Front(torch.rand(64), torch.rand(64), 1e-5)
    states = torch.randn(2, 128, 3), torch.randn(2, 128, 16)

    def few(x: Tensor, kept: dict | None, front: Front = plain, w: BlockWeights = w) -> tuple[Tensor, ...] | None:
        with nullcontext() if kept is None else unchanged(kept):
            return norm_and_mamba_block(x, x, front, w, *states, dtype=torch.float32)

    kept = {}
    assert few(x[:2], None) is None  # without, the parts are no slower
    assert few(x, kept) is None
    assert few(torch.zeros(1, 33, 64), kept) is None
    loose = Front(plain.weight, None, 0.5)
    for front, weights in ((plain, w), (centred, w), (plain, other), (loose, w), (plain, w)):
        normed = F.rms_norm if front.bias is None else F.layer_norm
        hidden = normed(2 * x[:2], (64,), *front[: 1 + (front.bias is not None)], eps=front.eps)
        expected = mamba_block_onwards(hidden, weights, *states, dtype=torch.float32, backend="numba")
        found = few(x[:2], kept, front, weights)
        for ours, theirs in zip((found[0], *found[2:]), expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=5e-6)
        assert torch.equal(found[1], 2 * x[:2])
    assert len(kept) == 4
    w.out_proj.mul_(2)
    assert all(map(torch.equal, found, few(x[:2], kept)))
    assert torch.allclose(few(x[:2], {})[0], 2 * found[0])
    monkeypatch.setattr("polymamba.kernels.unchanged.MOST", 4)
    few(x[:2], kept, centred, other)
    assert len(kept) == 1


def test_with_the_norm_before_it_what_it_leaves_to_the_parts(cast, two_processors, monkeypatch):
    tensors = cast(problem(2, 9, 64, 32), torch.float32)
    x, w = tensors.pop("hidden"), weights_of(tensors)
    conv, ssm = torch.zeros(2, 32, 3), torch.zeros(2, 32, 3)
    usual = {"x": x, "stream": x, "front": Front(torch.ones(64), torch.ones(64), 1e-5), "weights": w}
    usual |= {"conv_state": conv, "ssm_state": ssm, "dtype": torch.float32}
    (front, (scan,)), found = (usual["front"], w.scans), []
    changes = {
        "a processor would have nothing to do": {
            "x": x[:1],
            "stream": x[:1],
            "conv_state": conv[:1],
            "ssm_state": ssm[:1],
        },
        "no step": {"x": x[:, :0], "stream": x[:, :0]},
        "no batch": {"x": x[0]},
        "another width": {"x": torch.zeros(2, 9, 128), "stream": None},
        "double": {"x": x.double()},
        "autocast": {"dtype": torch.bfloat16},
        "a stream of one row": {"stream": x[:1]},
        "an empty stream": {"stream": x[:, :0]},
        "a stream in half": {"stream": x.bfloat16()},
        "a transposed stream": {"stream": x.mT},
        "a norm of another width": {"front": front._replace(weight=torch.ones(32))},
        "a norm in half": {"front": front._replace(bias=torch.ones(64).half())},
        "a convolution's state in half": {"conv_state": conv.bfloat16()},
        "a state of another width": {"ssm_state": ssm[:, :16]},
        "a state of one row": {"conv_state": conv[:1]},
        "no projection": {"weights": w._replace(in_proj=None)},
        "a wider projection": {"weights": w._replace(out_proj=torch.zeros(128, 32))},
        "two scans": {"weights": w._replace(scans=w.scans * 2)},
        "a wide rank": {"weights": w._replace(scans=(scan._replace(dt_proj=torch.zeros(32, 100)),))},
    }
    assert norm_and_mamba_block(**usual) is not None
    for name, change in changes.items():
        assert norm_and_mamba_block(**usual | change) is None, name
    torch.vmap(lambda stream: found.append(norm_and_mamba_block(**usual | {"stream": stream})) or stream)(x[None])
    assert found == [None]
    monkeypatch.setattr("polymamba.kernels.mamba_block.cpu.SHORTEST", 10)
    assert norm_and_mamba_block(**usual) is None


def test_with_the_norm_before_it_under_another_default(cast, two_processors):
    tensors = cast(problem(2, 20, 64, 70, 5, 3), torch.float32)
    x, front, w = tensors.pop("hidden"), Front(torch.ones(64), None, 1e-5), weights_of(tensors)
    expected = norm_and_mamba_block(x, None, front, w, dtype=torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        found = norm_and_mamba_block(x, None, front, w, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
