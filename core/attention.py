"""Causal multi-head self-attention, with rotary positions (RoPE, arXiv 2104.09864) or none, and its cache.

    q, k, v = in_proj(hidden)
    q, k    = each rotated by its token's place in the sequence
    y_t     = sum over s <= t of softmax_s(q_t . k_s / sqrt(K)) v_s      for each head, by PyTorch's fused attention
    out     = out_proj(y)

RoPE turns channels j and j + K/2 of a head by the angle place * theta^(-2j/K): Llama's and GPT-NeoX's halves, not the
paper's neighbours. No biases, no dropout of weights.

Nothing is ever held for all pairs of tokens: without a state the fused kernels know what is causal, with one the mask
is made for so many queries at a time that it stays small, and packed sequences are read one after another. On a GPU the
fused kernels' backward adds in no fixed order, unless torch.use_deterministic_algorithms says so.
Letters: B batch, L length, H heads, K channels of a head, C room in the cache.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import autocast_dtype
from .padding import Padding

MASK_ELEMENTS = 1 << 24  # of one mask; each is a byte, or a float in some of the kernels
MIN_ROOM = 64


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, a row's at 0 to length - 1 of the room for C; what is beyond counts not."""

    keys: Tensor  # (B, C, H, K), rotated
    values: Tensor  # (B, C, H, K)
    length: Tensor  # (B,) int64


class Attention(nn.Module):
    """(B, L, d_model) -> (B, L, d_model). `n_heads` divides d_model; rope_theta None leaves positions out (NoPE)."""

    projects_input = True

    def __init__(self, d_model: int, n_heads: int, rope_theta: float | None = 10000.0):
        super().__init__()
        self.n_heads, self.d_head, self.rope_theta = n_heads, d_model // n_heads, rope_theta
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)  # queries, keys, values
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        for projection in (self.in_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=0.02)

    def forward(
        self,
        hidden: Tensor,
        state: KVCache | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """hidden (B, L, d_model) -> the same shape, or (that, the state after it) iff return_state.

        cu_seqlens (S + 1,) is read by the host, so it cannot be compiled into one graph.
        """
        qkv = self._project(hidden)
        if cu_seqlens is None:
            y, after = self._attend(qkv, state)
        else:
            ends = cu_seqlens.tolist()
            pieces = [
                self._attend(qkv[:, start:end], None if state is None else KVCache(*(s[i : i + 1] for s in state)))
                for i, (start, end) in enumerate(pairwise(ends))
            ]
            y = torch.cat([piece for piece, _ in pieces], 1)
            after = _stacked([cache for _, cache in pieces]) if return_state else None
        y = self.out_proj(y.flatten(2))
        return y if after is None or not return_state else (y, _in_own_memory(after))

    def forward_padded(
        self, hidden: Tensor, padding: Padding, *, state: KVCache | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, KVCache]:
        """`forward` of rows that hold padding. At the end of a row it is after all that it could be seen by."""
        y, after = self._attend(self._project(padding.moved_left(hidden)), state)
        y = padding.moved_back(self.out_proj(y.flatten(2)))
        if not return_state:
            return y
        length = padding.n_real.clone() if state is None else state.length + padding.n_real
        return y, _in_own_memory(after._replace(length=length))

    @torch.no_grad()
    def step(self, hidden: Tensor, state: KVCache) -> Tensor:
        """hidden (B, d_model) -> (B, d_model); `state` updated in place, with more room where it has too little.

        While a CUDA graph is captured the host cannot know the lengths: then the room must suffice from the beginning
        (`init_state`'s max_length), and all of it is looked at.
        """
        keys, values, length = state
        q, k, v = self._rotated(self._project(hidden[:, None]), length[:, None])
        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            n = keys.shape[1]
        else:
            n = int(length.max()) + 1
            if n > keys.shape[1]:
                for cache in (keys, values):  # the tensors stay the same ones, so that all who hold the state see it
                    cache.data = _with_room(cache, max(2 * cache.shape[1], MIN_ROOM))
        rows = torch.arange(len(length), device=length.device)
        keys[rows, length] = k[:, 0].to(keys.dtype)
        values[rows, length] = v[:, 0].to(values.dtype)
        y = attention_from(q, keys[:, :n], values[:, :n], length)
        length += 1
        return self.out_proj(y.flatten(1))

    def init_state(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """Room for `max_length` tokens; with None there is none yet, and `step` makes it as it goes.

        In the dtype that is computed in: under autocast autocast's, else the weights'.
        """
        weight = self.in_proj.weight
        dtype = autocast_dtype(weight)
        keys = weight.new_zeros(batch_size, max_length or 0, self.n_heads, self.d_head, dtype=dtype)
        return KVCache(keys, torch.zeros_like(keys), weight.new_zeros(batch_size, dtype=torch.int64))

    def _project(self, hidden: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, 3, H, K)."""
        return self.in_proj(hidden).unflatten(-1, (3, self.n_heads, self.d_head))

    def _attend(self, qkv: Tensor, state: KVCache | None) -> tuple[Tensor, KVCache]:
        """(B, L, 3, H, K) -> (y (B, L, H, K), keys and values of all tokens so far)."""
        batch, n_new = qkv.shape[:2]
        places = torch.arange(n_new, device=qkv.device)
        if state is None:
            q, k, v = self._rotated(qkv, places)
            q, keys, values = (x.transpose(1, 2) for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
            return y.transpose(1, 2), KVCache(k, v, places.new_full((batch,), n_new))
        places = state.length[:, None] + places
        q, k, v = self._rotated(qkv, places)
        n = int(state.length.max()) + n_new
        index = places[..., None, None].expand_as(k)
        keys, values = (
            _with_room(old, max(n, old.shape[1])).scatter_(1, index, new.to(old.dtype))
            for old, new in ((state.keys, k), (state.values, v))
        )
        return attention_from(q, keys[:, :n], values[:, :n], state.length), KVCache(keys, values, state.length + n_new)

    def _rotated(self, qkv: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, 3, H, K) -> q, k, v (B, L, H, K), q and k turned by their places (L,) or (B, L)."""
        if self.rope_theta is None:
            return qkv.unbind(2)  # pyright: ignore[reportReturnType]
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        exponents = torch.arange(0, self.d_head, 2, device=qkv.device, dtype=dtype) / self.d_head
        angle = (places[..., None] * self.rope_theta**-exponents)[..., None, None, :]
        cos, sin = angle.cos(), angle.sin()
        a, b = qkv[:, :, :2].to(dtype).chunk(2, dim=-1)
        q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(qkv.dtype).unbind(2)
        return q, k, qkv[:, :, 2]


def attention_from(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """Causal attention of q (B, L, H, K), whose places are from start (B,) on, to k, v (B, C, H, K): (B, L, H, K)."""
    q, k, v = (x.to(q.dtype).transpose(1, 2) for x in (q, k, v))
    places = start[:, None] + torch.arange(q.shape[2], device=q.device)
    seen = torch.arange(k.shape[2], device=q.device)
    n_at_once = max(1, MASK_ELEMENTS // max(1, len(start) * len(seen)))
    y = [
        F.scaled_dot_product_attention(some, k, v, attn_mask=seen <= at[:, None, :, None])
        for some, at in zip(q.split(n_at_once, 2), places.split(n_at_once, 1), strict=True)
    ]
    return torch.cat(y, 2).transpose(1, 2)


def _in_own_memory(cache: KVCache) -> KVCache:
    return KVCache(cache.keys.contiguous(), cache.values.contiguous(), cache.length)


def _with_room(cache: Tensor, room: int) -> Tensor:
    """(B, C, H, K) -> (B, room, H, K), a copy with zeros at the end."""
    batch, n, *rest = cache.shape
    return torch.cat((cache, cache.new_zeros(batch, room - n, *rest)), 1)


def _stacked(caches: list[KVCache]) -> KVCache:
    """Caches of one row each as one of many rows, all with the room of the largest."""
    room = max(cache.keys.shape[1] for cache in caches)
    keys, values = (torch.cat([_with_room(getattr(c, name), room) for c in caches]) for name in ("keys", "values"))
    return KVCache(keys, values, torch.cat([cache.length for cache in caches]))
