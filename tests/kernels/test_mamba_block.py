"""The block as one operation of autograd: every backend against its parts by the references, in float64."""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from polymamba.kernels.mamba_block import (
    mamba_block,
    serves,
)

BACKENDS = ["numba", "triton"]


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


def settle(block, options: dict):
    options = dict(options)
    arguments = {name: options.pop(name) for name in ("reverse", "scale") if name in options}
    ends = options.pop("ends", None)
    if ends:
        arguments["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    return block.problem(**options), arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, backend, results_of, cast, assert_close, block):
    tensors, arguments = settle(block, OPTIONS[name])
    expected = results_of(block.run, tensors, "reference", **arguments)
    actual = results_of(block.run, cast(tensors, torch.float32), backend, **arguments)
    assert_close(actual, expected, 5e-6, f"{name}, {backend}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_cuda(name, results_of, cast, assert_close, block):
    tensors, arguments = settle(block, OPTIONS[name])
    expected = results_of(block.run, tensors, "reference", device="cuda", **arguments)
    actual = results_of(block.run, cast(tensors, torch.float32), "cuda", **arguments)
    assert_close(actual, expected, 5e-6, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_size(dtype, results_of, cast, assert_close, block):
    """Gradients of a usual shape; of weights in float32, as under autocast."""
    tensors = block.problem(3, 1025, 200, 402, 16, 13)
    tensors = cast(tensors, torch.float32) | {"hidden": tensors["hidden"].to(dtype)}
    expected = results_of(block.run, cast(tensors, torch.float64), "reference", device="cuda")
    actual = results_of(block.run, tensors, "cuda")
    assert_close(actual, expected, 2e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_with_weights_in_float32(backend, results_of, cast, assert_close, block):
    tensors = cast(block.problem(scans=2), torch.float32)
    tensors["hidden"] = tensors["hidden"].bfloat16()
    both = {"reverse": (False, True)}
    actual = results_of(block.run, tensors, backend, **both)
    half = {name for name, x in actual.items() if x.dtype == torch.bfloat16}
    assert half == {"y", "grad_hidden"}
    assert_close(actual, results_of(block.run, cast(tensors, torch.float64), "reference", **both), 4e-2)


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
def test_recorded_as_a_graph_it_is_the_same(dtype, scans, cast, block):
    """There the directions are branches, which run side by side, and what is made of small weights alone is one."""
    tensors = {
        k: None if x is None else x.cuda()
        for k, x in cast(block.problem(3, 200, 40, 80, 16, 5, scans=scans), dtype).items()
    }
    hidden, weights = tensors.pop("hidden"), block.weights_of(tensors)
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
def test_only_what_is_trained_has_a_gradient(trained, cast, block):
    """And the gradients are those of training all, to the bit."""
    tensors = cast(block.problem(scans=2), torch.float32)
    gradients = []
    for names in (trained.split(), list(tensors)):
        leaves = {name: x.clone().requires_grad_(name in names) for name, x in tensors.items()}
        block.run(**leaves, backend="numba", reverse=(False, True)).square().sum().backward()
        gradients.append({name: x.grad for name, x in leaves.items()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (name not in trained.split()), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("backend", ["numba", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_repeats_to_the_bit(backend, results_of, cast, block):
    tensors = cast(block.problem(3, 300, 40, 80), torch.float32)
    first, again = (results_of(block.run, tensors, backend) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("retained", [False, True])
def test_what_was_saved_is_released_in_the_backward(retained, cast, monkeypatch, block):
    """Unless the graph is retained: then it may be gone through again, to the same bits."""
    tensors = {name: x.requires_grad_() for name, x in cast(block.problem(), torch.float32).items()}
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
        y = block.run(**tensors, backend="numba")
    first = torch.autograd.grad(y.sum(), list(tensors.values()), retain_graph=retained)
    assert alive[0][:3] == [True, True, retained]  # hidden, (x, z), y: in the order in which they were saved
    if retained:
        again = torch.autograd.grad(y.sum(), list(tensors.values()))
        assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


def test_what_it_does_not_do(cast, block):
    tensors = cast(block.problem(), torch.float32)
    hidden = tensors.pop("hidden").requires_grad_()
    (gradient,) = torch.autograd.grad(block.run(hidden, **tensors, backend="numba").sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(ValueError, match=r"runs on numba, triton or cuda, which do not serve torch\.float64"):
        mamba_block(hidden, block.weights_of(tensors), dtype=torch.float64)
    weights = block.weights_of(tensors)
    assert serves(hidden, weights, torch.float32)
    assert not serves(hidden.double(), weights, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_it_is_the_same(backend, cast, block):
    tensors = cast(block.problem(scans=2), torch.float32)
    options = {"backend": backend, "reverse": (False, True), "scale": 0.5}
    trained = block.run(**(tensors | {"hidden": tensors["hidden"].requires_grad_()}), **options)
    with torch.no_grad():
        plain = block.run(**tensors, **options)
    assert plain.grad_fn is None
    assert trained.grad_fn is not None
    assert torch.equal(plain, trained)
