"""The Mamba block forwards and backwards, of one scan or of several: little to save, little for the host to do.

Forward, with T tokens of all sequences laid end to end, M model width, E inner width, R rank of dt, N states:

    (x, z)      = hidden W_in'                          (T, 2E); each half a view
    u           = silu(conv(x))                         (T, E)
    (t, B, C)   = u W_x'                                (T, R + 2N)
    delta       = t W_dt'                               (T, E); the scan adds dt's bias in float32
    y           = scan(u, delta, -exp(A_log), B, C, D) silu(z)
    out         = y W_out'                              (T, M)

A bidirectional block has two scans, each from its convolution on with weights of its own, and y is their sum. On a GPU
one kernel makes both u, the two are branches of a graph that is recorded, and in inference the last product adds them
up, (y_1, y_2) (W_out, W_out)', which rounds once less; with what comes behind the block (`mamba_block_and_norm`) the
scans leave the gate to the kernel that makes all of that. Saved are hidden, (x, z), y, and of each scan (t, B, C) and
the checkpoints; u and delta, as large as y, are made again. Backward, where a line that more than one scan has a share
in is the sum of these:

    dy          = dout W_out                            dW_out = dout' y
    du, ddelta, dA, dB, dC, dD, dz, dbias               the scan's own backward
    d(t, B, C)  = (ddelta W_dt, dB, dC)                 dW_dt = ddelta' t
    du         += d(t, B, C) W_x                        dW_x = d(t, B, C)' u;  dA_log = dA A
    dx                                                  the convolution's own backward, of du
    dhidden     = (dx, dz) W_in                         dW_in = (dx, dz)' hidden

dx and dz are written to the two halves of one matrix. What was saved is released when it has been read for the last
time, unless the graph is retained. In CUDA C++ du takes dy's memory; delta, and then ddelta, that of dx: so at its most
the backward has (x, z), the checkpoints, dy, u, (delta, dz) and the scan's shares (benchmarks/SCAN_NOTES.md counts).
Nothing is written over what was saved or given. Either projection may be left out: what comes in is then (x, z), what
comes out y. Where the sequences are pieces of longer ones, a Border brings the states at their beginnings, and the
gradients of those at their ends.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..casting import cast_all
from ..causal_conv1d import interface as conv_interface
from ..operators import module, of_first_order
from ..selective_scan import interface as scan_interface
from ..streams import aside, side_by_side


class ScanWeights(NamedTuple):
    """E inner width, R rank of dt, N states, W conv width."""

    conv: Tensor  # (E, 1, W)
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + 2N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor | None  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)


class BlockWeights(NamedTuple):
    """M model width; of all scans E, R and N are the same."""

    in_proj: Tensor | None  # (2E, M)
    out_proj: Tensor | None  # (M, E)
    scans: tuple[ScanWeights, ...]


class Border(Protocol):
    """What pieces of sequences (B, L, ..) have to do with those beside them; each call is one for all of these."""

    def before(self, x: Tensor, width: int, reverse: bool) -> Tensor:
        """The convolution's state before x (B, L, E), (B, E, width)."""
        ...

    def add_gradient(self, dstate: Tensor, dx: Tensor, reverse: bool) -> None:
        """Give dstate, of such a state, to those that it came from; add to dx, (B, L, E), what comes from others."""
        ...

    def state_before(self, *inputs: Any, reverse: bool) -> tuple[Tensor, Tensor]:
        """The scan's state before u, delta, A, B, C, bias: (B, E, N), and something for `gradient_after`."""
        ...

    def gradient_after(self, dy: Tensor, *inputs: Any, reverse: bool) -> Tensor:
        """That of the scan's state after delta, z, bias, A, C, and that something: (B, E, N)."""
        ...


class Behind(NamedTuple):
    """What comes behind a block: its result is added to the residual stream, and that is normed as by `rms_norm`."""

    stream: Tensor  # (B, L, M), float32
    weight: Tensor  # (M,)
    eps: float


NARROW = 64  # the largest rank of dt whose product the CPU's scan makes; measured, it is slower from 128 on


def _scans(flat: Iterable[Any]) -> list[ScanWeights]:
    return [ScanWeights(*seven) for seven in zip(*[iter(flat)] * len(ScanWeights._fields), strict=True)]


class Settings(NamedTuple):
    dtype: torch.dtype
    n_channels: int
    rank: int
    n_states: int
    batch: int
    reverse: tuple[bool, ...]
    scale: float
    border: Border | None
    save: bool
    conv_backend: str
    scan_backend: str

    def halves(self, xz: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 2E) -> x, z (T, E)."""
        return xz[:, : self.n_channels], xz[:, self.n_channels :]

    def by_sequence(self, *tensors: Tensor) -> list[Tensor]:
        """(T, ..) -> (B, L, ..)."""
        return [x.unflatten(0, (self.batch, -1)) for x in tensors]

    def parts(self, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, R + 2N) -> t (T, R), B, C (T, 1, N)."""
        matrices = low[:, None, self.rank :]
        return low[:, : self.rank], matrices[..., : self.n_states], matrices[..., self.n_states :]

    def convolution(self, direction: str, reverse: bool, *inputs: Any, **options: Any) -> Any:
        """`forward` or `backward` of (.., x, weight, bias, initial state, cu_seqlens)."""
        run = conv_interface.implementation(self.conv_backend, direction)
        return run(*inputs, self.batch, True, reverse, **options)

    def convolved(self, x: Tensor, scans: list[ScanWeights], cu_seqlens: Tensor | None) -> tuple[Tensor, ...] | None:
        """u of both directions, where one kernel makes it; x (T, E)."""
        if (self.conv_backend, self.reverse, self.border) == ("triton", (False, True), None):
            first, second = scans
            if first.conv.shape == second.conv.shape:
                weights = first.conv[:, 0], first.conv_bias, second.conv[:, 0], second.conv_bias
                both_ways = conv_interface.implementation("triton", "both_ways")
                return both_ways(x, *weights, cu_seqlens, self.batch, True)
        return None

    def scan(self, direction: str, *inputs: Any, **options: Any) -> Any:
        return scan_interface.implementation(self.scan_backend, direction)(*inputs, **options)

    @property
    def widens_in_scan(self) -> bool:
        """Whether the scan makes delta of t by itself: the CPU's does, faster than a product of few columns."""
        return self.scan_backend == "numba" and self.border is None and self.rank <= NARROW

    def low_rank(self, u: Tensor, x_proj: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
        """(t, B, C) (T, R + 2N); delta (T, E), or t where the scan widens it."""
        if self.conv_backend == "triton" and len(u):
            kernel = module(__package__ or "", "triton_low_rank")
            if kernel.serves(u, self.rank, len(x_proj)):
                return kernel.low_rank(u, x_proj, dt_proj)
        low = torch.mm(u, x_proj.t())
        t, _, _ = self.parts(low)
        return low, t if self.widens_in_scan else torch.mm(t, dt_proj.t())


def forward(
    s: Settings, cu_seqlens, hidden, in_proj, out_proj, *flat, before=(None, None), after=None, behind=None
) -> tuple[Tensor, tuple[Any, ...]]:
    """(the result, what a backward needs). before: the states of each scan; to `after` those at the end are added.

    behind: a Behind; then (what is normed, the new stream alone).
    """
    scans = _scans(flat)
    with torch.autocast(hidden.device.type, enabled=False):
        in_proj, out_proj, *low_rank = cast_all(
            *(s.dtype, in_proj, out_proj), *(w for scan in scans for w in (scan.x_proj, scan.dt_proj))
        )
        # Where nothing is kept the last product adds up the results of several scans, which lie side by side.
        wide = None
        if len(scans) > 1 and out_proj is not None and not s.save and s.scan_backend == "cuda":
            wide = hidden.new_empty(hidden.shape[0] * hidden.shape[1], len(scans), s.n_channels, dtype=s.dtype)

        def of_weights_alone() -> tuple[list[Any], Any, Tensor | None]:
            own = cast_all(torch.float32, *(w for scan in scans for w in (scan.A_log, scan.D, scan.dt_bias)))
            A_of = torch._foreach_exp(own[::3])
            torch._foreach_neg_(A_of)
            scaled = out_proj if out_proj is None or s.scale == 1 else out_proj * s.scale
            if scaled is not None and wide is not None and behind is None:
                scaled = scaled.repeat(1, len(scans))
            return own, A_of, scaled

        weights_ready = aside(of_weights_alone, hidden)
        rows = hidden.to(s.dtype).flatten(0, 1)
        xz = rows if in_proj is None else torch.mm(rows, in_proj.t())
        x, z = s.halves(xz)
        kept: list[Any] = []
        convolved = s.convolved(x, scans, cu_seqlens)
        own, A_of, out_proj = weights_ready()

        def scanned(i: int) -> Tensor:
            """The result of a scan; adds to `kept` what its backward needs."""
            scan, A, reverse = scans[i], A_of[i], s.reverse[i]
            x_proj, dt_proj, D, dt_bias = *low_rank[2 * i : 2 * i + 2], *own[3 * i + 1 : 3 * i + 3]
            taps, (halo, state), passed = scan.conv[:, 0], before, None
            if s.border is not None:
                halo = s.border.before(s.by_sequence(x)[0], taps.shape[1] - 1, reverse)
            if convolved is None:
                u = s.convolution("forward", reverse, x, taps, scan.conv_bias, halo, cu_seqlens)
            else:
                u = convolved[i]
            low, delta = s.low_rank(u, x_proj, dt_proj)
            _, B, C = s.parts(low)
            if s.border is not None:
                u_, delta_, B_, C_ = s.by_sequence(u, delta, B, C)
                state, passed = s.border.state_before(u_, delta_, A, B_, C_, dt_bias, reverse=reverse)
            options = {"dt_proj": dt_proj} if s.widens_in_scan else {}
            if wide is not None:
                options["y"] = wide[:, i]
            elif s.scan_backend == "numba" and s.dtype == torch.float32 and not s.save:
                options["y"] = u  # whose memory is at hand: what is written anew has to be fetched first
            gate = z if behind is None else None
            y, final, saved = s.scan(
                *("forward", u, delta, A, B, C, D, gate, dt_bias, state, cu_seqlens, s.batch, True, reverse, s.save),
                **options,
            )
            if after is not None:
                last = conv_interface.last_inputs(s.by_sequence(x)[0], taps.shape[1] - 1, halo)
                after.append((last, final.contiguous()))
            kept.extend((low, saved, taps, scan.conv_bias, x_proj, dt_proj, dt_bias, A, D, halo, state, passed))
            return y

        y, *others = side_by_side(scanned, len(scans), hidden, s.border is None)
        if behind is not None:
            stream = behind.stream.flatten(0, 1)
            onto_stream = module(__package__ or "", "triton_onto_stream").onto_stream
            normed, stream = onto_stream(wide, z, out_proj, stream, behind.weight, behind.eps)
            return normed.view_as(hidden), (stream.view_as(hidden),)
        if wide is not None and out_proj is not None:
            out = torch.mm(wide.flatten(1), out_proj.t())
        else:
            for other in others:
                y.add_(other)
            out = y if out_proj is None else torch.mm(y, out_proj.t())
    own_rows = (None if in_proj is None else xz), (None if out_proj is None else y)
    return out.view(*hidden.shape[:2], out.shape[1]), (cu_seqlens, rows, *own_rows, in_proj, out_proj, *kept)


class Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, cu_seqlens, hidden, *flat):  # pyright: ignore[reportIncompatibleMethodOverride]
        out, kept = forward(s, cu_seqlens, hidden, *flat)
        ctx.settings, ctx.hidden_shape, ctx.weight_dtype = s, hidden.shape, flat[4].dtype
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, dout)


@of_first_order
def _gradients(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    s, saved_tensors = ctx.settings, ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()  # not if the graph is retained; else these here are all that keeps them
    cu_seqlens, rows, xz, y, in_proj, out_proj = saved_tensors[:6]
    of_scans = [saved_tensors[i : i + 12] for i in range(6, len(saved_tensors), 12)]
    del saved_tensors
    of_hidden, of_in_proj, of_out_proj = ctx.needs_input_grad[2:5]
    d_in_proj = d_out_proj = dhidden = None
    found: list[list[Tensor | None]] = []  # of each scan, in the order of ScanWeights
    with torch.autocast(rows.device.type, enabled=False):
        dy = dout.flatten(0, 1)
        if out_proj is not None:
            d_out_proj = torch.mm(dy.t(), y) if of_out_proj else None
            if d_out_proj is not None and s.scale != 1:
                d_out_proj.mul_(s.scale)
            del y
            dy = torch.mm(dy, out_proj)
        xz = rows if xz is None else xz
        x, z = s.halves(xz)
        for wanted, reverse in zip(_scans(ctx.needs_input_grad[5:]), s.reverse, strict=True):
            low, saved, taps, conv_bias, x_proj, dt_proj, dt_bias, A, D, halo, state, passed = of_scans.pop(0)
            u = s.convolution("forward", reverse, x, taps, conv_bias, halo, cu_seqlens)
            t, B, C = s.parts(low)
            dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
            dx, dz = s.halves(dxz)
            in_place = s.scan_backend == "cuda"
            delta = torch.mm(t, dt_proj.t(), out=dx if in_place else None)
            dstate = None
            if s.border is not None:
                dy_, delta_, z_, C_ = s.by_sequence(dy, delta, z, C)
                dstate = s.border.gradient_after(dy_, delta_, z_, dt_bias, A, C_, passed, reverse=reverse)
            room = {"ddelta": delta, "du": None if of_scans or out_proj is None else dy} if in_place else {}
            du, ddelta, dA, dB, dC, dD, _, dbias, _ = s.scan(
                *("backward", dy, dstate, u, delta, A, B, C, D, z, dt_bias, state, cu_seqlens, s.batch, saved, True),
                *(reverse, dz),
                **room,
            )
            del saved, delta
            du, ddelta = du.to(s.dtype), ddelta.to(s.dtype)
            dlow = torch.cat((torch.mm(ddelta, dt_proj), dB[:, 0].to(s.dtype), dC[:, 0].to(s.dtype)), 1)
            d_dt_proj = torch.mm(ddelta.t(), t) if wanted.dt_proj else None
            d_x_proj = torch.mm(dlow.t(), u) if wanted.x_proj else None
            del u, ddelta
            du.addmm_(dlow, x_proj)
            _, dconv, dconv_bias, dhalo = s.convolution(
                "backward", reverse, du, x, taps, conv_bias, halo, cu_seqlens, dx=dx
            )
            if s.border is not None:
                s.border.add_gradient(dhalo, s.by_sequence(dx)[0], reverse)
            if in_proj is None:
                dhidden = dxz if dhidden is None else dhidden.add_(dxz)
            if in_proj is not None and of_in_proj:
                d_in_proj = torch.mm(dxz.t(), rows) if d_in_proj is None else d_in_proj.addmm_(dxz.t(), rows)
            if in_proj is not None and of_hidden:
                dhidden = torch.mm(dxz, in_proj) if dhidden is None else dhidden.addmm_(dxz, in_proj)
            biases = dconv_bias if conv_bias is not None else None, dbias if dt_bias is not None else None
            found.append([dconv[:, None], biases[0], d_x_proj, d_dt_proj, biases[1], dA * A, dD])
            del dxz, dx, dz, du, dlow, room  # before another scan's are made
        products = d_in_proj, d_out_proj, *(product for scan in found for product in scan[2:4])
        d_in_proj, d_out_proj, *low_rank = cast_all(ctx.weight_dtype, *products)
        for i, scan in enumerate(found):
            scan[2:4] = low_rank[2 * i : 2 * i + 2]
    dhidden = None if dhidden is None else dhidden.view(ctx.hidden_shape)
    # What is still in another dtype than its input the engine converts.
    return None, None, dhidden, d_in_proj, d_out_proj, *(w for scan in found for w in scan)
