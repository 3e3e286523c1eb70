"""Attention against a plain softmax in float64 with RoPE by complex numbers, and against transformers' Llama."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from polymamba.core import Attention, attention
from polymamba.core.generation import with_equal_room
from polymamba.core.padding import Padding

THETAS = [10000.0, 50.0, None]


def mixer(n_heads: int = 3, rope_theta: float | None = 10000.0, d_model: int = 30) -> Attention:
    torch.manual_seed(0)
    module = Attention(d_model, n_heads, rope_theta).double()
    for projection in (module.in_proj, module.out_proj):
        torch.nn.init.normal_(projection.weight, std=0.5)  # far from uniform weights
    return module


def inputs(batch: int, length: int, d_model: int = 30) -> Tensor:
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def truth(module: Attention, x: Tensor) -> Tensor:
    """One sequence (L, d_model), token by token and head by head."""
    length, d_model = x.shape
    width = d_model // module.n_heads
    q, k, v = ((x @ w.T).view(length, module.n_heads, width) for w in module.in_proj.weight.split(d_model))
    if module.rope_theta is not None:
        frequencies = module.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = torch.polar(torch.ones(()).double(), torch.arange(length)[:, None] * frequencies)[:, None]
        q, k = (torch.complex(*y.chunk(2, -1)) * turns for y in (q, k))
        q, k = (torch.cat((y.real, y.imag), -1) for y in (q, k))
    out = [
        torch.stack(
            [
                torch.softmax(k[: t + 1, head] @ q[t, head] / width**0.5, 0) @ v[: t + 1, head]
                for head in range(module.n_heads)
            ]
        ).flatten()
        for t in range(length)
    ]
    return torch.stack(out) @ module.out_proj.weight.T


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-11):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rope_theta", THETAS)
@pytest.mark.parametrize("n_heads", [1, 3, 5])
def test_forward_and_gradients(n_heads, rope_theta):
    module, x = mixer(n_heads, rope_theta), inputs(3, 17)
    weights = inputs(3, 17) + 1
    gradients = []
    for run in (module, lambda x: torch.stack([truth(module, row) for row in x])):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y * weights).sum().backward()
        gradients.append([y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for ours, expected in zip(*gradients, strict=True):
        close(ours, expected)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 40), st.sampled_from(THETAS))
@settings(max_examples=40, deadline=None)
def test_in_any_pieces(pieces, n_mask, rope_theta):
    """Forwards through the state, of any lengths, with a mask for any number of queries; then steps."""
    module, total = mixer(rope_theta=rope_theta), sum(pieces) + 3
    x = inputs(2, total)
    expected = torch.stack([truth(module, row) for row in x])
    state, done, out = module.init_state(2), 0, []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "MASK_ELEMENTS", n_mask)
        for length in pieces:
            y, state = module(x[:, done : done + length], state, return_state=True)
            done += length
            out.append(y)
        assert state.length.tolist() == [done] * 2
        out += [module.step(x[:, t], state)[:, None] for t in range(done, total)]
    close(torch.cat(out, 1), expected)


@pytest.mark.parametrize("with_state", [False, True])
def test_gradients_through_a_state(with_state):
    module, x = mixer(), inputs(2, 11)
    weights = inputs(2, 11) + 1
    gradients = []
    for pieces in ([11], [4, 7]):
        module.zero_grad()
        state, out = module.init_state(2) if with_state else None, []
        for piece in x.split(pieces, 1):
            y, state = module(piece, state, return_state=True)
            out.append(y)
        (torch.cat(out, 1) * weights).sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@torch.no_grad()
def test_packed_with_states():
    module, x = mixer(), inputs(1, 23)
    before = [module(inputs(1, n + 1)[:, 1:], return_state=True)[1] for n in (3, 0, 5)]
    packed = pytree.tree_map(lambda *s: torch.cat(s), *with_equal_room(*before))
    ends = torch.tensor([0, 9, 10, 23], dtype=torch.int32)
    y, after = module(x, packed, return_state=True, cu_seqlens=ends)
    assert after.length.tolist() == [12, 1, 18]
    for i, (start, end) in enumerate([(0, 9), (9, 10), (10, 23)]):
        alone, after_alone = module(x[:, start:end], before[i], return_state=True)
        close(y[:, start:end], alone)
        n = int(after.length[i])
        close(after.keys[i, :n], after_alone.keys[0, :n])
        close(after.values[i, :n], after_alone.values[0, :n])


@torch.no_grad()
def test_room():
    module, x = mixer(), inputs(3, 200)
    state = module.init_state(3, max_length=200)
    assert state.keys.shape == state.values.shape == (3, 200, 3, 10)
    where = state.keys.data_ptr()
    growing = module.init_state(3)
    same, at = growing.keys, []
    for t in range(200):
        close(module.step(x[:, t], state), module.step(x[:, t], growing))
        at.append(growing.keys.data_ptr())
    assert state.keys.data_ptr() == where, "there was room"
    assert same is growing.keys
    assert same.shape[1] == 256
    assert len(set(at)) <= 3, "64, 128, 256: not a copy for every token"
    close(state.keys, growing.keys[:, :200])
    given = state.keys.clone()
    y, after = module(x[:, :5], state, return_state=True)
    assert torch.equal(state.keys, given), "forward changed the state it was given"
    assert state.length.tolist() == [200] * 3
    assert after.keys.shape[1] == 205
    assert y.isfinite().all()


@torch.no_grad()
def test_what_padding_holds_is_never_seen():
    module, x = mixer(), inputs(2, 9)
    mask = torch.tensor([[False] * 3 + [True] * 4 + [False] * 2, [True] * 9])
    padding = Padding.of(mask)
    y, state = module.forward_padded(x, padding, return_state=True)
    other = x.masked_fill(~mask[..., None], 1e3)
    y2, state2 = module.forward_padded(other, padding, return_state=True)
    assert torch.equal(y[mask], y2[mask])
    assert state.length.tolist() == state2.length.tolist() == [4, 9]
    close(module.step(x[:, 0], state), module.step(x[:, 0], state2))
    after, after2 = (module.forward_padded(z, padding, state=s) for z, s in ((x, state), (other, state2)))
    close(after[mask], after2[mask])


@pytest.mark.slow
def test_is_llamas():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=30, num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=64)
    config._attn_implementation = "eager"
    theirs, ours, x = llama.LlamaAttention(config, layer_idx=0).double(), mixer(), inputs(2, 19)
    q, k, v = ours.in_proj.weight.data.split(30)
    theirs.load_state_dict(
        {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": ours.out_proj.weight.data}
    )
    rotary = llama.LlamaRotaryEmbedding(config)
    mask = torch.full((19, 19), -torch.inf).triu(1).double()[None, None]
    expected = theirs(x, rotary(x, torch.arange(19)[None]), mask)[0]
    close(ours(x), expected, 1e-5)  # Llama's angles are float32


def test_autocast_computes_and_remembers_in_bf16():
    module, x = copy.deepcopy(mixer()).float(), inputs(2, 12).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = module.init_state(2)
        assert state.keys.dtype == torch.bfloat16
        _, state = module(x[:, :9], state, return_state=True)
        steps = torch.stack([module.step(x[:, t], state) for t in range(9, 12)], 1)
        assert state.keys.dtype == module(x, return_state=True)[1].keys.dtype == torch.bfloat16
    expected = module(x)[:, 9:]
    close(steps.float(), expected, 0.05 * expected.abs().max().item())
