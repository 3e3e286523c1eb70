"""The block as one operation of autograd: every backend against its parts by the references, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polymamba.kernels import causal_conv1d, selective_scan
from polymamba.kernels.mamba_block import BlockWeights, mamba_block, serves

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
):
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    hidden = normal(batch, length, 2 * channels if "in_proj" in absent else width) * 3
    shapes = {
        "in_proj": (2 * channels, width), "conv": (channels, 1, taps), "conv_bias": (channels,),
        "x_proj": (rank + 2 * states, channels), "dt_proj": (channels, rank), "dt_bias": (channels,),
        "A_log": (channels, states), "D": (channels,), "out_proj": (width, channels),
    }  # fmt: skip
    weights = {name: None if name in absent.split() else normal(*shape) for name, shape in shapes.items()}
    return {"hidden": hidden, **weights}


def run(
    hidden: Tensor, *, backend: str, cu_seqlens: Tensor | None = None, reverse: bool = False, **weights: Tensor | None
) -> Tensor:
    w = BlockWeights(**weights)
    if backend != "reference":
        return mamba_block(hidden, w, dtype=hidden.dtype, cu_seqlens=cu_seqlens, reverse=reverse, backend=backend)
    options = {"cu_seqlens": cu_seqlens, "reverse": reverse, "backend": backend}
    x, z = (hidden if w.in_proj is None else F.linear(hidden, w.in_proj)).chunk(2, dim=-1)
    u = causal_conv1d(x, w.conv[:, 0], w.conv_bias, **options)
    rank, states = w.dt_proj.shape[1], w.A_log.shape[1]
    t, B, C = F.linear(u, w.x_proj).split([rank, states, states], dim=-1)
    delta, A = F.linear(t, w.dt_proj), -w.A_log.exp()
    y = selective_scan(u, delta, A, B, C, w.D, z, delta_bias=w.dt_bias, delta_softplus=True, **options)
    return y if w.out_proj is None else F.linear(y, w.out_proj)


OPTIONS = {
    "whole": {},
    "no step": {"length": 0},
    "odd channels, long": {"batch": 1, "length": 70, "channels": 7},
    "between the projections": {"absent": "in_proj out_proj"},
    "no biases": {"absent": "conv_bias dt_bias"},
    "one state, no taps before": {"states": 1, "taps": 1},
    "reverse": {"reverse": True},
    "packed": {"batch": 1, "length": 12, "ends": [0, 5, 5, 12]},
    "packed, reverse, between the projections": {
        "batch": 1, "length": 12, "ends": [0, 1, 12], "reverse": True, "absent": "in_proj out_proj",
    },
}  # fmt: skip


def settle(options: dict):
    options = dict(options)
    arguments = {"reverse": options.pop("reverse", False)}
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
    tensors = cast(problem(), torch.float32) | {"hidden": problem()["hidden"].bfloat16()}
    actual = results_of(run, tensors, backend)
    half = {name for name, x in actual.items() if x.dtype == torch.bfloat16}
    assert half == {"y", "grad_hidden"}
    assert_close(actual, results_of(run, cast(tensors, torch.float64), "reference"), 4e-2)


@pytest.mark.parametrize("trained", ["hidden", "in_proj", "x_proj", "dt_proj A_log", "conv D", "out_proj"])
def test_only_what_is_trained_has_a_gradient(trained, cast):
    """And the gradients are those of training all, to the bit."""
    tensors = cast(problem(), torch.float32)
    gradients = []
    for names in (trained.split(), list(tensors)):
        leaves = {name: x.clone().requires_grad_(name in names) for name, x in tensors.items()}
        run(**leaves, backend="numba").square().sum().backward()
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


def test_what_it_does_not_do(cast):
    tensors = cast(problem(), torch.float32)
    hidden = tensors.pop("hidden").requires_grad_()
    (gradient,) = torch.autograd.grad(run(hidden, **tensors, backend="numba").sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(ValueError, match=r"runs on numba, triton or cuda, which do not serve torch\.float64"):
        mamba_block(hidden, BlockWeights(**tensors), dtype=torch.float64)
    weights = BlockWeights(**tensors)
    assert serves(hidden, weights, torch.float32)
    assert not serves(hidden.detach(), weights, torch.float32)
    assert not serves(hidden.double(), weights, torch.float32)
    with torch.no_grad():
        assert not serves(hidden, weights, torch.float32)
