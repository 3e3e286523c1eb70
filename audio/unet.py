"""A causal U-Net over sequences (SaShiMi, arXiv 2202.09729; with Mamba, arXiv 2312.00752, section 4.4).

    at rate r:   blocks, each output kept             (layout unet)
                 down-pool: p steps into one          linear, (width p) -> width of rate r + 1
                     ... all of rate r + 1 ...
                 up-pool: one step into p, which are those of the NEXT p steps: that delay makes it causal
                 + skip, then blocks, + skip after each (unet), or around them all (sashimi)

As a recurrence it is periodic: rate r takes a step when rate r - 1 has taken p. What a down-pool has gathered of the
step that has begun, and what an up-pool has still to give out, are part of the state, besides the blocks' own.
`forward` begins and ends anywhere in the period, for each row of a batch at another place.

Letters: B batch, L length, D width at a rate, p pool, P period (product of the pools).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..core.backbone import Block
from ..core.hub import PretrainedModel
from ..core.norm import NORM_CLASSES
from ..core.padding import Padding
from .config import UNetConfig


class UNetState(NamedTuple):
    """Where sequences stand. All tensors have the batch first."""

    position: Tensor  # (B,) int64: steps taken at rate 0
    pending: list[Tensor]  # of each down-pool, (B, p, D): the inputs of the step that has begun; 0 where still to come
    queue: list[Tensor]  # of each up-pool, (B, p, D): the outputs of these p steps
    blocks: list[Any]  # of each block, in the order of `UNet.all_blocks`


class DownPool(nn.Linear):
    """(B, n p, D) -> (B, n, D'). Channels of a step stand together: feature d p + s is channel d of step s."""

    def __init__(self, width: int, pool: int, widened: int):
        super().__init__(width * pool, widened)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)  # the stream between blocks is float32, whatever the weights are
        return super().forward(rearrange(x, "b (n p) d -> b n (d p)", p=self.pool))


class UpPool(nn.Linear):
    """(B, n, D') -> (B, n p, D), not yet delayed."""

    def __init__(self, width: int, pool: int, widened: int):
        super().__init__(widened, width * pool)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(x.to(self.weight.dtype)), "b n (d p) -> b (n p) d", p=self.pool)


class UNet(PretrainedModel):
    """(B, L, d_model) -> (B, L, d_model), causal. `only_down` leaves the way up out: see `encode`."""

    config_class = UNetConfig

    def __init__(self, config: UNetConfig, *, only_down: bool = False):
        super().__init__(config)
        self.gradient_checkpointing = False  # as of core's Backbone
        rates, pools = range(len(config.pool)), config.pool
        width = config.width
        both_ways = config.layout == "unet"
        self.down_blocks: Any = nn.ModuleList(_stage(config, rate) if both_ways else nn.ModuleList() for rate in rates)
        self.down_pools: Any = nn.ModuleList(DownPool(width(rate), pools[rate], width(rate + 1)) for rate in rates)
        self.center: Any = _stage(config, len(pools))
        if only_down:
            self.norm = NORM_CLASSES[config.norm](width(len(pools)), 1e-5)
        else:
            self.up_pools: Any = nn.ModuleList(UpPool(width(rate), pools[rate], width(rate + 1)) for rate in rates)
            self.up_blocks: Any = nn.ModuleList(_stage(config, rate) for rate in rates)
            self.norm = NORM_CLASSES[config.norm](width(0), 1e-5)
        self.only_down = only_down
        self._index = {block: i for i, block in enumerate(self.all_blocks())}
        with torch.no_grad():  # so that the residual stream's variance does not grow with depth, as in core's Backbone
            for block in self.all_blocks():
                block.mixer.out_proj.weight /= math.sqrt(len(self._index))

    def all_blocks(self) -> Iterator[Block]:
        """In the order in which they run."""
        for blocks in self.down_blocks:
            yield from blocks
        yield from self.center
        if not self.only_down:
            for blocks in reversed(self.up_blocks):
                yield from blocks

    def forward(
        self,
        x: Tensor,
        state: UNetState | None = None,
        *,
        condition: Sequence[Tensor] | None = None,
        return_state: bool = False,
        padding_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, UNetState]:
        """x (B, L, d_model) -> y of the same shape, or (y, state) iff return_state.

        state         from `init_state` or an earlier call, at any place of the period. It is not changed.
        condition     (B, D) of each rate, added to all that enters it.
        padding_mask  bool (B, L), True = real; as of core's Backbone.
        """
        padding = None if padding_mask is None else Padding.of(padding_mask)
        if padding is not None and padding_mask is not None:
            x = padding.moved_left(x.masked_fill(~padding_mask[..., None], 0))
        run = _Parallel(self, x.shape[0], state, condition, None if padding is None else padding.n_real, return_state)
        y, _ = self.norm(run.rate(0, x), None)
        if padding is not None and padding_mask is not None:
            y = padding.moved_back(y).masked_fill(~padding_mask[..., None], 0)
        return (y, run.state_after(x.shape[1])) if return_state else y

    def encode(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The way down alone: x (B, L, d_model), right-padded -> (z (B, ceil(L / P), D) innermost, its mask)."""
        n_real = None if padding_mask is None else padding_mask.sum(1)
        run = _Parallel(self, x.shape[0], None, None, n_real, False)
        z, n_real = run.down_to_center(x)
        mask = None if n_real is None else torch.arange(z.shape[1], device=z.device) < n_real[:, None]
        return self.norm(z, None)[0], mask

    def init_state(self, batch_size: int) -> UNetState:
        """The state before the first step."""
        weight = self.norm.weight
        shapes = [(batch_size, p, self.config.width(rate)) for rate, p in enumerate(self.config.pool)]
        return UNetState(
            weight.new_zeros(batch_size, dtype=torch.int64),
            [weight.new_zeros(shape) for shape in shapes],
            [weight.new_zeros(shape) for shape in shapes],
            [block.mixer.init_state(batch_size) for block in self.all_blocks()],
        )

    @torch.no_grad()
    def step(self, x: Tensor, state: UNetState, condition: Sequence[Tensor] | None = None) -> Tensor:
        """One step: x (B, d_model) -> (B, d_model); `state` updated in place. The host reads where the rows stand."""
        phases = [position % self.config.period for position in state.position.tolist()]
        if len(set(phases)) == 1:
            return self.step_at(phases[0], x, state, condition)
        y = torch.empty_like(x)
        for phase in sorted(set(phases)):  # rows at other places of the period have other things to do
            rows = torch.tensor([row for row, at in enumerate(phases) if at == phase], device=x.device)
            part = pytree.tree_map(lambda s, rows=rows: s[rows], state)
            y[rows] = self.step_at(phase, x[rows], part, None if condition is None else [c[rows] for c in condition])
            for whole, new in zip(pytree.tree_leaves(state), pytree.tree_leaves(part), strict=True):
                whole[rows] = new
        return y

    @torch.no_grad()
    def step_at(self, phase: int, x: Tensor, state: UNetState, condition: Sequence[Tensor] | None = None) -> Tensor:
        """`step` where all rows stand at this place of the period, 0 to P - 1: nothing is read from the device."""
        y, _ = self.norm.step(_Step(self, state, condition).rate(0, x, phase), None)
        state.position.add_(1)
        return y


def _stage(config: UNetConfig, rate: int) -> nn.ModuleList:
    c = config.stage(rate)
    return nn.ModuleList(Block(c, c.pattern[i % len(c.pattern)]) for i in range(c.n_layer))


class _Traversal:
    """The order of things, the same for whole sequences and single steps."""

    def __init__(self, unet: UNet, condition: Sequence[Tensor] | None):
        self.unet, self.condition = unet, condition

    def block(self, block: Block, x: Tensor, *where: Any) -> Tensor:
        raise NotImplementedError

    def inner(self, rate: int, x: Tensor, *where: Any) -> Tensor:
        """Down-pool, all within, up-pool: what of it comes out at these steps of `rate`."""
        raise NotImplementedError

    def rate(self, rate: int, x: Tensor, *where: Any) -> Tensor:
        """All that happens at this rate and within."""
        unet = self.unet
        skips = [x]
        x = self.conditioned(rate, x)
        if rate == len(unet.down_pools):
            for block in unet.center:
                x = self.block(block, x, *where)
            return x + skips.pop()
        for block in unet.down_blocks[rate]:
            x = self.block(block, x, *where)
            skips.append(x)
        x = self.inner(rate, x, *where) + skips.pop()
        around = x
        for block in unet.up_blocks[rate]:
            x = self.block(block, x, *where)
            if skips:
                x = x + skips.pop()
        return x + around if unet.config.layout == "sashimi" else x

    def conditioned(self, rate: int, x: Tensor) -> Tensor:
        if self.condition is None:
            return x
        return x + (self.condition[rate][:, None] if x.dim() == 3 else self.condition[rate])


class _Parallel(_Traversal):
    """Whole sequences. `where`: at, the rate's steps before them, and n_real (B,), how many are real (None: all).

    at is one int for all rows, or (B,) where they differ.
    """

    def __init__(
        self,
        unet: UNet,
        batch: int,
        state: UNetState | None,
        condition: Sequence[Tensor] | None,
        n_real: Tensor | None,
        return_state: bool,
    ):
        super().__init__(unet, condition)
        self.begin = state
        self.position: int | Tensor = 0
        if state is not None:
            places = state.position.tolist()
            self.position = places[0] if len(set(places)) == 1 else state.position
        self.n_real = n_real
        self.after = unet.init_state(batch) if return_state else None

    def rate(self, rate: int, x: Tensor, *where: Any) -> Tensor:
        if not where:
            where = self.position, self.n_real
        if x.shape[1] == 0:  # not one whole step
            if self.after is not None and self.begin is not None:
                self._keep_within(rate)
            return x
        return super().rate(rate, x, *where)

    def block(self, block: Block, x: Tensor, *where: Any) -> Tensor:
        _, n_real = where
        padding = None
        if n_real is not None:
            padding = Padding.of(torch.arange(x.shape[1], device=x.device) < n_real[:, None])
        i = self.unet._index[block]
        options: dict[str, Any] = {"state": None if self.begin is None else self.begin.blocks[i]}
        options |= {"return_state": self.after is not None, "padding": padding}
        if self.unet.gradient_checkpointing and torch.is_grad_enabled():
            out, stream, state = checkpoint(block, x, None, use_reentrant=False, **options)  # pyright: ignore
        else:
            out, stream, state = block(x, None, **options)
        if self.after is not None:
            self.after.blocks[i] = state
        return stream + out

    def inner(self, rate: int, x: Tensor, *where: Any) -> Tensor:
        at, n_real = where
        unet, begin, length = self.unet, self.begin, x.shape[1]
        p = unet.config.pool[rate]
        begun = at % p  # steps of the one within that were taken before
        most = begun if isinstance(begun, int) else int(begun.max())
        if begin is None:
            gathered, queue = x, x.new_zeros(x.shape[0], p, x.shape[2])
        else:
            pending, queue = begin.pending[rate].to(x.dtype), begin.queue[rate].to(x.dtype)
            latest_last = _cut(torch.cat((pending, pending), 1), begun, p)
            gathered = _cut(torch.cat((latest_last, x), 1), p - begun, length + most)
        n_gathered = begun + (length if n_real is None else n_real)
        done = n_gathered // p  # steps within
        n_within = None if isinstance(done, int) else done
        steps = gathered[:, : gathered.shape[1] // p * p]
        within = self.rate(rate + 1, unet.down_pools[rate](steps), at // p, n_within)
        out = torch.cat((queue, unet.up_pools[rate](within).to(queue.dtype)), 1)  # the delay: a queue ahead
        if self.after is not None:
            rest, n_rest = _cut(F.pad(gathered, (0, 0, 0, p)), done * p, p), n_gathered - done * p
            slots = torch.arange(p, device=x.device)
            real = slots < (n_rest if isinstance(n_rest, int) else n_rest[:, None])
            dtype = self.after.queue[rate].dtype
            self.after.pending[rate] = torch.where(real[..., None], rest, 0).to(dtype)
            self.after.queue[rate] = _cut(out, done * p, p).to(dtype).contiguous()
        return _cut(out, begun, length)

    def down_to_center(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Nothing is delayed on the way down: the last step within may see padding in place of what is to come."""
        n_real = self.n_real
        for rate, (blocks, pool) in enumerate(zip(self.unet.down_blocks, self.unet.down_pools, strict=True)):
            for block in blocks:
                x = self.block(block, x, rate, n_real)
            if n_real is not None:
                x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= n_real[:, None])[..., None], 0)
                n_real = -(-n_real // pool.pool)
            x = pool(F.pad(x, (0, 0, 0, -x.shape[1] % pool.pool)))
        for block in self.unet.center:
            x = self.block(block, x, len(self.unet.down_pools), n_real)
        return x, n_real

    def state_after(self, length: int) -> UNetState:
        assert self.after is not None
        n = length if self.n_real is None else self.n_real
        before = self.after.position if self.begin is None else self.begin.position
        return self.after._replace(position=before + n)

    def _keep_within(self, rate: int) -> None:
        """What is at this rate and within has not moved; a copy, for a step works in place."""
        assert self.after is not None
        assert self.begin is not None
        for r in range(rate, len(self.unet.down_pools)):
            self.after.pending[r], self.after.queue[r] = self.begin.pending[r].clone(), self.begin.queue[r].clone()
        for block in self._blocks_within(rate):
            i = self.unet._index[block]
            self.after.blocks[i] = pytree.tree_map(torch.clone, self.begin.blocks[i])

    def _blocks_within(self, rate: int) -> Iterator[Block]:
        for r in range(rate, len(self.unet.down_pools)):
            yield from self.unet.down_blocks[r]
            yield from self.unet.up_blocks[r]
        yield from self.unet.center


class _Step(_Traversal):
    """A single step. `where`: the rate's steps before it, short of whole periods."""

    def __init__(self, unet: UNet, state: UNetState, condition: Sequence[Tensor] | None):
        super().__init__(unet, condition)
        self.state = state

    def block(self, block: Block, x: Tensor, *where: Any) -> Tensor:
        out, stream = block.step(x, None, self.state.blocks[self.unet._index[block]])
        return stream + out

    def inner(self, rate: int, x: Tensor, *where: Any) -> Tensor:
        pending, queue = self.state.pending[rate], self.state.queue[rate]
        within, slot = divmod(where[0], self.unet.config.pool[rate])
        pending[:, slot] = x
        out = queue[:, slot].clone()
        if slot == self.unet.config.pool[rate] - 1:
            z = self.rate(rate + 1, self.unet.down_pools[rate](pending)[:, 0], within)
            queue.copy_(self.unet.up_pools[rate](z[:, None]))
            pending.zero_()
        return out


def _cut(x: Tensor, start: int | Tensor, length: int) -> Tensor:
    """x[:, start : start + length] of x (B, T, D), for a start of each row's own (B,); what is beyond counts not."""
    if isinstance(start, int):
        return x[:, start : start + length]
    places = (start[:, None] + torch.arange(length, device=x.device)).clamp(max=x.shape[1] - 1)
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
