"""The norm and the block behind it as one call, for inference on a CPU: against their parts, in float64."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polymamba.kernels import layer_norm, rms_norm
from polymamba.kernels.mamba_block import BlockWeights, Front, mamba_block_onwards, norm_and_mamba_block
from polymamba.kernels.unchanged import unchanged


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


def in_double(block, x: Tensor, stream: Tensor | None, front: Front, weights: BlockWeights):
    """(out, the new stream), by the parts."""
    if front.bias is None:
        normed, stream = rms_norm(x, front.weight, front.eps, residual=stream)
    else:
        normed, stream = layer_norm(x, front.weight, front.bias, front.eps, residual=stream)
    return block.run(normed, backend="reference", **weights._asdict() | weights.scans[0]._asdict()), stream


@pytest.mark.parametrize("behind", ["start", "stream", "stream, layer norm"])
@pytest.mark.parametrize("name", BEHIND_A_NORM)
def test_with_the_norm_before_it(name, behind, cast, assert_close, two_processors, block):
    tensors = block.problem(**{"width": 64} | BEHIND_A_NORM[name])
    x = tensors.pop("hidden")
    generator = torch.Generator().manual_seed(3)
    stream, weight, bias = (torch.randn(s, generator=generator, dtype=x.dtype) for s in (x.shape, *[x.shape[-1:]] * 2))
    inputs = {"x": x, "stream": stream if "stream" in behind else None, "weight": weight}
    inputs["bias"] = bias if "layer" in behind else None

    def tensors_of(dtype: torch.dtype):
        own = cast(inputs, dtype)
        w = block.weights_of(cast(tensors, dtype))
        return own["x"], own["stream"], Front(own["weight"], own["bias"], 1e-5), w

    out, stream = in_double(block, *tensors_of(torch.float64))
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


def test_with_the_norm_before_it_a_sequence_is_itself(cast, two_processors, block):
    """To the bit, whatever its batch mates are and however many, and however many threads there are."""
    tensors = cast(block.problem(8, 120, 64, 128, 16, 4), torch.float32)
    x, front = tensors.pop("hidden"), Front(torch.rand(64), None, 1e-5)
    w = block.weights_of(tensors)
    whole = norm_and_mamba_block(x, None, front, w, dtype=torch.float32)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, whole, norm_and_mamba_block(x, None, front, w, dtype=torch.float32)))
    finally:
        torch.set_num_threads(n_threads)
    pair = norm_and_mamba_block(x[[5, 2]], None, front, w, dtype=torch.float32)
    assert all(torch.equal(a[[5, 2]], b) for a, b in zip(whole, pair, strict=True))


def test_a_few_tokens_where_the_weights_lie_ready(cast, monkeypatch, block):
    """One sequence for a processor at most. What is kept is each block's weights as they were, and of no other call."""
    if not import_module("polymamba.kernels.numba_lanes").AVX512:
        pytest.skip("for a CPU with AVX-512")
    monkeypatch.setattr("polymamba.kernels.mamba_block.cpu._processors", lambda: 2)
    tensors = cast(block.problem(3, 9, 64, 128, 16, 4), torch.float32)
    x, w = tensors.pop("hidden"), block.weights_of(tensors)
    other = block.weights_of({name: 1.5 * t for name, t in tensors.items()})
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


def test_with_the_norm_before_it_what_it_leaves_to_the_parts(cast, two_processors, monkeypatch, block):
    tensors = cast(block.problem(2, 9, 64, 32), torch.float32)
    x, w = tensors.pop("hidden"), block.weights_of(tensors)
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


def test_with_the_norm_before_it_under_another_default(cast, two_processors, block):
    tensors = cast(block.problem(2, 20, 64, 70, 5, 3), torch.float32)
    x, front, w = tensors.pop("hidden"), Front(torch.ones(64), None, 1e-5), block.weights_of(tensors)
    expected = norm_and_mamba_block(x, None, front, w, dtype=torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        found = norm_and_mamba_block(x, None, front, w, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
