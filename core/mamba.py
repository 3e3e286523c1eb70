"""The Mamba block (arXiv 2312.00752, section 3.4 and figure 3) and a bidirectional one.

    x, z = in_proj(hidden)
    x = silu(conv1d(x))                         causal, depthwise
    dt, B, C = x_proj(x)                        dt of low rank, widened by dt_proj
    y = selective_scan(x, dt, A, B, C, D) silu(z)
    out = out_proj(y)

Parameter names and initialisation are mamba-ssm's, so that its checkpoints load unchanged.
Letters: B batch, L length, E inner width (expand * d_model), N states, R rank of dt, W convolution width.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from ..kernels import MambaWeights, causal_conv1d_step, mamba_step, selective_scan_step
from ..kernels.backends import watched
from .mamba_at_once import as_made, at_once, at_once_onwards, norm_and_at_once
from .norm import AddLayerNorm, AddRMSNorm
from .padding import forward_as_pack
from .pieces import causal_conv1d, selective_scan


class MambaState(NamedTuple):
    """What a Mamba block remembers of a sequence, of a size that does not grow with it."""

    conv: Tensor  # (B, E, W - 1): the convolution's last inputs, most recent last
    ssm: Tensor  # (B, E, N), float32


def initial_dt_bias(shape: tuple[int, ...], dt_min: float = 1e-3, dt_max: float = 1e-1) -> Tensor:
    """softplus^-1(dt) with dt log-uniform in [dt_min, dt_max]: mamba-ssm's initial bias of the step sizes."""
    dt = (torch.rand(shape) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).exp()
    return dt + torch.log(-torch.expm1(-dt))


class SelectiveSSM(nn.Module):
    """Convolution, input-dependent parameters, scan and gate: the block between its two projections."""

    def __init__(self, d_inner: int, d_state: int, d_conv: int, dt_rank: int):
        super().__init__()
        self.d_state, self.dt_rank = d_state, dt_rank
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        # Decay to zero would mean "never forget" for A_log, "always the same step" for dt's bias.
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue] - read by optim.py
        self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        """mamba-ssm's initialisation.

        A_log           log(1..N) for every channel: the S4D-real spectrum A = -(n + 1)
        D               1
        dt_proj.weight  uniform(-R^-1/2, R^-1/2)
        dt_proj.bias    see initial_dt_bias
        """
        n_channels = self.D.shape[0]
        self.A_log.copy_(repeat(torch.arange(1, self.d_state + 1).log(), "n -> e n", e=n_channels))
        self.D.fill_(1.0)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_proj.bias.copy_(initial_dt_bias((n_channels,)))

    @property
    def A(self) -> Tensor:
        return -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log)

    def _parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Step sizes (.., E) short of their bias; that, for the scan to add in float32; B, C (.., N)."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if not as_made(self.dt_proj):
            return self.dt_proj(dt), None, B, C
        return F.linear(dt, self.dt_proj.weight), self.dt_proj.bias, B, C

    def forward(
        self,
        xz: Tensor,
        state: MambaState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, MambaState | None]:
        """xz (B, L, 2E), x and z side by side -> y (B, L, E), and the state after it if asked for."""
        if state is None and not return_state and type(self) in (SelectiveSSM, Mamba):
            y = at_once(self, xz, cu_seqlens, reverse=(reverse,), projected=False)
            if y is not None:
                return y, None
        x, z = xz.chunk(2, dim=-1)
        conv, ssm = (None, None) if state is None else state
        options: Any = {"return_final_state": return_state, "cu_seqlens": cu_seqlens, "reverse": reverse}
        out = causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias, initial_state=conv, **options)
        x, conv = out if isinstance(out, tuple) else (out, None)
        dt, dt_bias, B, C = self._parameters_of(x)
        out = selective_scan(
            *(x, dt, self.A, B, C, self.D, z),
            delta_bias=dt_bias,
            delta_softplus=True,
            initial_state=ssm,
            **options,
        )
        y, ssm = out if isinstance(out, tuple) else (out, None)
        return y, None if conv is None or ssm is None else MambaState(conv, ssm)

    def step(self, x: Tensor, z: Tensor, state: MambaState) -> Tensor:
        """x, z (B, E) -> y (B, E); `state` updated in place."""
        x = causal_conv1d_step(state.conv, x, self.conv1d.weight[:, 0], self.conv1d.bias)
        dt, dt_bias, B, C = self._parameters_of(x)
        return selective_scan_step(
            *(state.ssm, x, dt, self.A, B[:, None], C[:, None], self.D, z),
            delta_bias=dt_bias,
            delta_softplus=True,
        )


_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
_STEPPED = (nn.Linear, nn.Conv1d, AddRMSNorm, AddLayerNorm)


class Mamba(SelectiveSSM):
    """The Mamba block alone: (B, L, d_model) -> (B, L, d_model), causal."""

    projects_input = True

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None):
        d_inner = expand * d_model
        super().__init__(d_inner, d_state, d_conv, -(-d_model // 16) if dt_rank is None else dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(
        self,
        hidden: Tensor,
        state: MambaState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """hidden (B, L, d_model) -> the same shape, or (that, state) iff return_state."""
        if state is None and not return_state and type(self) is Mamba:
            out = at_once(self, hidden, cu_seqlens, projected=True)
            if out is not None:
                return out
        elif return_state and cu_seqlens is None and type(self) is Mamba:
            onwards = at_once_onwards(self, hidden, (None, None) if state is None else state)
            if onwards is not None:
                return onwards[0], MambaState(*onwards[1:])
        y, after = super().forward(self.in_proj(hidden), state, return_state=return_state, cu_seqlens=cu_seqlens)
        return self.out_proj(y) if after is None else (self.out_proj(y), after)

    def forward_with(
        self,
        norm: AddRMSNorm,
        x: Tensor,
        stream: Tensor | None,
        state: MambaState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, MambaState | None] | None:
        """The norm and then this block at once: (out, the new stream, the state after it if asked for).

        None where they have to be run one after the other, or where that is no slower.
        """
        if cu_seqlens is not None:
            return None
        found = norm_and_at_once(norm, self, x, stream, (None, None) if state is None else state)
        if found is None:
            return None
        out, stream, *after = found
        return out, stream, MambaState(*after) if return_state else None

    def step(self, hidden: Tensor, state: MambaState) -> Tensor:
        """hidden (B, d_model) -> (B, d_model); `state` updated in place."""
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        return self.out_proj(super().step(x, z, state))

    def weights_with(self, norm: AddRMSNorm, x: Tensor, state: MambaState) -> MambaWeights | None:
        """What a fused step of the norm and then of this block reads.

        None where the parts have to be run one after another: if one is not what it was made as (an adapter, a
        quantised layer) or has a hook, if autocast computes in another dtype, if autograd or a compiler looks on.
        """
        # Not by attribute: what nn.Module does to find one, for all of these, takes a third of a small block's step.
        parts: list[Any] = [norm, *(self._modules[name] for name in _PARTS)]
        own: dict[str, Any] = self._parameters
        device = x.device.type
        if (
            device not in ("cpu", "cuda")
            or type(self) is not Mamba
            or not as_made(*parts, kinds=_STEPPED)
            or torch.is_autocast_enabled(device)
        ):
            return None
        norm_weight, in_proj, conv, x_proj, dt_proj, out_proj = (part._parameters["weight"] for part in parts)
        norm_bias, in_bias, conv_bias, x_bias, dt_bias, out_bias = (part._parameters.get("bias") for part in parts)
        weights = MambaWeights(
            *(norm_weight, norm_bias, in_proj, conv[:, 0], conv_bias, x_proj, dt_proj, dt_bias),
            *(own["A_log"], own["D"], out_proj),
        )
        biased = any(bias is not None for bias in (in_bias, x_bias, out_bias))
        if biased or x.dtype != in_proj.dtype or x.dtype == torch.float64 or watched(x, *state, *weights):
            return None
        if not all(s.is_contiguous() for s in state):  # it is updated in place
            return None
        return weights

    def step_with(
        self, norm: AddRMSNorm, x: Tensor, stream: Tensor | None, state: MambaState
    ) -> tuple[Tensor, Tensor] | None:
        """A step of the norm and then of this block as one kernel: (out, stream). None: see `weights_with`."""
        weights = self.weights_with(norm, x, state)
        if weights is None:
            return None
        return mamba_step(x, stream, *state, weights, norm.eps, centred=weights.norm_bias is not None)

    forward_padded = forward_as_pack

    def init_state(self, batch_size: int, max_length: int | None = None) -> MambaState:
        """The state before the first token; it does not grow, whatever `max_length` is."""
        weight = self.in_proj.weight
        n_channels, width = self.conv1d.weight.shape[0], self.conv1d.weight.shape[2]
        ssm_dtype = torch.promote_types(weight.dtype, torch.float32)
        return MambaState(
            weight.new_zeros(batch_size, n_channels, width - 1),
            weight.new_zeros(batch_size, n_channels, self.d_state, dtype=ssm_dtype),
        )


class BiMamba(nn.Module):
    """A Mamba block that sees both ways: two selective SSMs, one run backwards, between shared projections.

    Sharing the projections, which hold most parameters, is Caduceus's idea (arXiv 2403.03234, section 3.1).
    """

    projects_input = True

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None):
        super().__init__()
        d_inner, rank = expand * d_model, -(-d_model // 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.forwards = SelectiveSSM(d_inner, d_state, d_conv, rank)
        self.backwards = SelectiveSSM(d_inner, d_state, d_conv, rank)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, hidden: Tensor, *, cu_seqlens: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """hidden (B, L, d_model) -> the same shape; scale: a factor of out_proj, for a mean in place of the sum."""
        scans = self.forwards, self.backwards
        if as_made(*scans, kinds=(SelectiveSSM,)):
            out = at_once(self, hidden, cu_seqlens, scans=scans, reverse=(False, True), projected=True, scale=scale)
            if out is not None:
                return out
        xz = self.in_proj(hidden)
        left_to_right, _ = self.forwards(xz, cu_seqlens=cu_seqlens)
        right_to_left, _ = self.backwards(xz, cu_seqlens=cu_seqlens, reverse=True)
        both = left_to_right + right_to_left
        return self.out_proj(both if scale == 1 else both * scale)

    forward_padded = forward_as_pack
