"""From an AudioModel to the tables of fused_kernel.py, and its states to and from them.

On a GPU cuda_kernels/write.cu reads the same tables, but for the order of a matrix's elements: see fused_cuda.py.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.mamba import Mamba
from ..core.mlp import MLP
from ..core.norm import AddLayerNorm, AddRMSNorm
from ..kernels.numba_runtime import LOG2E
from .config import N_CODES
from .fused_kernel import ADD, COPY, LINEAR, MAMBA, N_OPERANDS, NORM, PUT, TAKE
from .fused_kernel import MLP as MLP_OP
from .model import AudioModel, AudioState
from .unet import UNet, UNetState


def can_fuse(model: Any) -> bool:
    """Whether this is a float32 model on one device, as it was made, of mixers that the kernels know.

    Under autocast to bfloat16 its matrices will be rounded to that, and nothing else.
    """
    if type(model) is not AudioModel or model.training:
        return False
    weights = list(model.parameters())
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain = all(p.dtype == torch.float32 and p.device == weights[0].device for p in weights)
    known = all(
        type(b.mixer) is Mamba or (type(b.mixer) is MLP and not b.mixer.gated and b.mixer.in_proj.bias is not None)
        for b in model.unet.all_blocks()
    )
    return plain and known and not hooked


class FusedModel:
    """The tables of a model: weights as they are now."""

    def __init__(self, model: AudioModel):
        self.model, unet = model, model.unet
        self.device = unet.norm.weight.device
        self._weights: list[Tensor] = []
        self._matrices: list[Tensor] = []
        self._n_weights = self._n_matrices = self._n_values = self._n_states = 0
        self._sizes = [0, 0, 0, 0]
        config = unet.config
        rates = len(config.pool) + 1
        self.width = config.d_model
        self.strides = np.cumprod([1, *config.pool]).astype(np.int64)
        with torch.no_grad():
            table = model.embedding(torch.arange(N_CODES + 1, device=self.device))
        self.embedding_at = self._weight(table)
        # Values: what a row of a batch has of its own, the first being what enters. Behind them are the blocks' states.
        self.x = [self._values(config.width(rate)) for rate in range(rates)]
        self.condition = [self._values(config.width(rate)) for rate in range(rates)] if model.label_embeddings else []
        self.pending = [self._values(config.width(r) * p) for r, p in enumerate(config.pool)]
        self.queue = [self._values(config.width(r) * p) for r, p in enumerate(config.pool)]
        self.blocks = [self._block(block) for block in unet.all_blocks()]
        self.logits_at = self._values(N_CODES)
        self._ops: list[list[int]] = []
        self._free: list[list[int]] = [[] for _ in range(rates)]  # places for skips that are not in use
        spans = []
        norm, head = self._norm(unet.norm), self._linear(model.head)
        self._places: dict[nn.Module, tuple[int, int]] = {}
        for depth in range(rates):
            first = len(self._ops)
            self._rate(unet, 0, depth)
            self._op(NORM, self.x[0], self.width, 0, 0, 0, 0, norm, 0, 0, isinstance(unet.norm, AddLayerNorm))
            self._op(LINEAR, self.x[0], self.width, self.logits_at, N_CODES, *head)
            spans.append((first, len(self._ops)))
        self.spans = np.array(spans, np.int64)
        self.ops = np.array(self._ops, np.int64)
        self.ops[self.ops[:, 0] == MAMBA, 8:10] += self._n_values  # the states' places
        self.weights, self.matrices = torch.cat(self._weights), torch.cat(self._matrices)
        del self._weights, self._matrices
        if torch.is_autocast_enabled(self.device.type):
            self.matrices = self.matrices.bfloat16()  # rounded to the nearest
        self.sizes = np.array(self._sizes, np.int64)

    # The tables

    def _weight(self, *tensors: Tensor) -> int:
        """Put tensors end to end; their place."""
        at = self._n_weights
        for tensor in tensors:
            self._weights.append(tensor.detach().to(self.device, torch.float32).flatten())
            self._n_weights += tensor.numel()
        return at

    def _matrix(self, *tensors: Tensor) -> int:
        """The same for matrices that are laid out."""
        at = self._n_matrices
        for tensor in tensors:
            self._matrices.append(tensor.flatten())
            self._n_matrices += tensor.numel()
        return at

    def _laid_out(self, weight: Tensor) -> Tensor:
        """The elements of a matrix (outputs, inputs) in the kernel's order."""
        return weight.detach().mT

    def _by_state(self, x: Tensor) -> Tensor:
        """What there is of channels and states, (.., E, N), in the kernel's order; `_by_channel` is the way back."""
        return x.mT

    def _by_channel(self, x: Tensor, E: int, N: int) -> Tensor:
        """(B, .) -> (B, E, N)."""
        return x.view(len(x), N, E).mT

    def _values(self, n: int) -> int:
        at = self._n_values
        self._n_values += -(-n // 4) * 4  # so that places divide by 4: a GPU moves four at once
        return at

    def _states(self, n: int) -> int:
        """A place behind all values."""
        at = self._n_states
        self._n_states += -(-n // 4) * 4
        return at

    def _op(self, *operands: int) -> None:
        self._ops.append([int(o) for o in operands] + [0] * (N_OPERANDS - len(operands)))

    def _linear(self, layer: nn.Linear) -> tuple[int, int]:
        """Places of bias and matrix."""
        return self._weight(layer.bias), self._matrix(self._laid_out(layer.weight))

    def _norm(self, norm: AddRMSNorm) -> int:
        bias = norm.bias if isinstance(norm, AddLayerNorm) else torch.zeros_like(norm.weight)
        return self._weight(norm.weight, bias, torch.tensor([norm.eps]))

    def _need(self, *sizes: int) -> None:
        self._sizes = [max(pair) for pair in zip(self._sizes, sizes, strict=True)]

    def _block(self, block: Any) -> tuple[int, ...]:
        """Kind, and operands 2 to 11, of the block's instruction."""
        mixer, centred = block.mixer, isinstance(block.norm, AddLayerNorm)
        at, M = self._norm(block.norm), len(block.norm.weight)
        if isinstance(mixer, MLP):
            inner = mixer.in_proj.out_features
            _, matrices = self._linear(mixer.in_proj)
            self._linear(mixer.out_proj)
            self._need(M, inner, 0, 0)
            return (MLP_OP, M, inner, 0, 0, 0, at, 0, 0, centred, matrices)
        E, N = mixer.A_log.shape
        R, W = mixer.dt_rank, mixer.conv1d.weight.shape[-1]
        n_low = -(-(R + 2 * N) // 16) * 16
        conv_bias = mixer.conv1d.bias if mixer.conv1d.bias is not None else torch.zeros(E)
        A = self._by_state(mixer.A * LOG2E)
        self._weight(conv_bias, mixer.conv1d.weight[:, 0].mT, mixer.dt_proj.bias, mixer.D, A)
        x_proj = F.pad(mixer.x_proj.weight, (0, 0, 0, n_low - (R + 2 * N)))
        into, low, out = map(self._laid_out, (mixer.in_proj.weight, x_proj, mixer.out_proj.weight))
        matrices = self._matrix(into, low, mixer.dt_proj.weight.detach().mT, out)
        self._need(M, 2 * E, n_low, E)
        return (MAMBA, M, E, N, R, W, at, self._states(E * (W - 1)), self._states(A.numel()), centred, matrices)

    def _rate(self, unet: UNet, rate: int, depth: int) -> None:
        """Instructions of `unet.rate`, at a sample at which `depth` rates within take a step."""
        x, width, number = self.x[rate], unet.config.width(rate), unet._index
        skips = [self._keep(rate, x, width)]
        if self.condition:
            self._op(ADD, x, self.condition[rate], width)
        if rate == len(unet.down_pools):
            for block in unet.center:
                self._run(number[block], x)
            self._add(rate, x, skips.pop(), width)
            return
        for block in unet.down_blocks[rate]:
            self._run(number[block], x)
            skips.append(self._keep(rate, x, width))
        pool, stride = unet.config.pool[rate], int(self.strides[rate])
        self._op(PUT, self.pending[rate], x, width, pool, stride)
        self._op(TAKE, x, self.queue[rate], width, pool, stride)
        if depth > rate:
            inner, wide = self.x[rate + 1], unet.config.width(rate + 1)
            down, up = unet.down_pools[rate], unet.up_pools[rate]
            kept = self._keep(rate, x, width)  # what came out of the queue, before it is filled anew
            self._op(LINEAR, self.pending[rate], width * pool, inner, wide, *self._once(down))
            self._rate(unet, rate + 1, depth)
            self._op(LINEAR, inner, wide, self.queue[rate], width * pool, *self._once(up))
            self._op(COPY, x, kept, width)
            self._free[rate].append(kept)
        self._add(rate, x, skips.pop(), width)
        around = self._keep(rate, x, width)
        for block in unet.up_blocks[rate]:
            self._run(number[block], x)
            if skips:
                self._add(rate, x, skips.pop(), width)
        if unet.config.layout == "sashimi":
            self._op(ADD, x, around, width)
        self._free[rate].append(around)

    def _run(self, i: int, x: int) -> None:
        kind, *operands = self.blocks[i]
        self._op(kind, x, *operands)

    def _once(self, layer: nn.Linear) -> tuple[int, int]:
        """The places of a layer's weights, which the instructions of several depths share."""
        if layer not in self._places:
            self._places[layer] = self._linear(layer)
        return self._places[layer]

    def _keep(self, rate: int, x: int, width: int) -> int:
        place = self._free[rate].pop() if self._free[rate] else self._values(width)
        self._op(COPY, place, x, width)
        return place

    def _add(self, rate: int, x: int, place: int, width: int) -> None:
        self._op(ADD, x, place, width)
        self._free[rate].append(place)

    # States

    def pack(self, state: AudioState) -> Tensor:
        """The values and states (B, n) of a state."""
        unet, n_rows = state.unet, len(state.label)
        v = torch.zeros(n_rows, self._n_values + self._n_states, device=self.device)

        def put(at: int, value: Tensor) -> None:
            flat = value.detach().reshape(n_rows, -1)
            v[:, at : at + flat.shape[1]] = flat

        with torch.no_grad():
            for at, embedding in zip(self.condition, self.model.label_embeddings, strict=True):
                put(at, embedding(state.label))
        for at, value in zip((*self.pending, *self.queue), (*unet.pending, *unet.queue), strict=True):
            put(at, value.mT)
        for (kind, *operands), of_block in zip(self.blocks, unet.blocks, strict=True):
            if kind == MAMBA:
                put(self._n_values + operands[6], of_block.conv.mT)
                put(self._n_values + operands[7], self._by_state(of_block.ssm))
        return v

    def unpack(self, v: Tensor, label: Tensor, position: Tensor) -> AudioState:
        """The state that values stand for; nothing of it is shared with them."""
        config, n_rows = self.model.config.unet, len(v)

        def get(at: int, *shape: int) -> Tensor:
            n = int(np.prod(shape))
            return v[:, at : at + n].view(n_rows, *shape).mT.clone(memory_format=torch.contiguous_format)

        sizes = [(config.width(rate), pool) for rate, pool in enumerate(config.pool)]
        blocks = []
        for block, (kind, *operands) in zip(self.model.unet.all_blocks(), self.blocks, strict=True):
            of_block = block.mixer.init_state(n_rows)
            if kind == MAMBA:
                _, E, N, _, W, _, conv_at, ssm_at, _, _ = operands
                conv, ssm_at = get(self._n_values + conv_at, W - 1, E), self._n_values + ssm_at
                size = self._by_state(torch.empty(E, N)).numel()
                ssm = self._by_channel(v[:, ssm_at : ssm_at + size], E, N)
                of_block = of_block._replace(conv=conv, ssm=ssm.clone(memory_format=torch.contiguous_format))
            blocks.append(of_block)
        # Of what has not begun, the slots that are still to come hold the step before.
        pending = [get(at, *size) for at, size in zip(self.pending, sizes, strict=True)]
        for rate, (steps, (_, pool)) in enumerate(zip(pending, sizes, strict=True)):
            filled = position // int(self.strides[rate]) % pool
            steps.masked_fill_((torch.arange(pool, device=v.device) >= filled[:, None])[..., None], 0)
        queue = [get(at, *size) for at, size in zip(self.queue, sizes, strict=True)]
        return AudioState(label.clone(), UNetState(position.clone(), pending, queue, blocks))
