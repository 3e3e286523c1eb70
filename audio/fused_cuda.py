"""The loop of fused_kernel.py on a GPU: cuda_kernels/write.cu, compiled for a model's sizes by kernels/nvrtc.py.

A recording has a block of threads of its own, which runs all of the network and draws the codes: nothing is launched
for a layer or a sample, and no recording waits for another. What a recording becomes depends, to the bit, on nothing
but itself and the weights: neither on how many there are nor on where its samples are cut into launches.
Letters: B recordings.
"""

import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import SamplingConfig
from ..kernels import nvrtc
from ..kernels.selective_scan import cuda as selective_scan
from .config import N_CODES
from .fused import FusedModel
from .fused_kernel import ADD, COPY, LINEAR, MAMBA, MLP, NORM
from .model import AudioModel

# Threads of a block, and blocks that a multiprocessor is to have room for: while there is one for each recording, and
# where there are more recordings. No result depends on it.
FEW, MANY = (512, 1), (256, 2)
AT_A_TIME = 2048  # samples of a launch: about a second at most, so that a user can stop it
_NONE = -1
_FIRST = 8  # the number of the first case that is compiled for its sizes: behind those of fused_kernel.py
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_SOURCES = (_COMMON / "device.cu", _COMMON / "numbers.cu", Path(__file__).parent / "cuda_kernels" / "write.cu")
_pack = struct.Struct("13q4d").pack  # struct Problem of write.cu


@cache
def _source(macros: tuple[tuple[str, Any], ...]) -> str:
    parts = [f"#define {name} {value}" for name, value in macros]
    return "\n".join([*parts, *(path.read_text() for path in _SOURCES)]) + "\n"


def _lanes(n_out: int, n_in: int, per_load: int) -> int:
    """Threads that share a row of a matrix: as few loads of a thread as can be, then as little else to do.

    A thread reads its part of the input once for all of its rows; sums over lanes it makes for each. Reckoned with one
    number of threads, whatever a block has: the order of a sum follows from it.
    """
    pieces = -(-n_in // per_load)

    def cost(log2: int) -> tuple[int, int]:
        passes, steps = -(-(n_out << log2) // FEW[0]), pieces >> log2
        return passes * steps, 2 * steps + passes * log2

    return 1 << min((log2 for log2 in range(6) if pieces % (1 << log2) == 0), key=cost)


class CudaModel(FusedModel):
    """A model's tables on its GPU, and the kernel for them. Raises nvrtc.Unavailable if there can be none."""

    def __init__(self, model: AudioModel, n_recordings: int, *, guided: bool):
        device = model.head.weight.get_device()
        if not selective_scan.usable(device):
            raise nvrtc.Unavailable("this GPU or this PyTorch has no NVRTC kernels")
        self.threads, blocks = FEW if n_recordings <= nvrtc.processors(device) else MANY
        self.dtype = torch.bfloat16 if torch.is_autocast_enabled(model.head.weight.device.type) else torch.float32
        self.per_load = 16 // self.dtype.itemsize
        super().__init__(model)
        cases: dict[str, int] = {}
        ops, spans = self._joined()
        for op in ops:
            if (case := self._case(op)) is not None:
                op[0] = cases.setdefault(case, _FIRST + len(cases))
        self.ops_table = torch.tensor(ops, dtype=torch.int32, device=self.device)
        normed, inner, low, y = self.sizes.tolist()
        macros = {
            "T": "bf16" if self.dtype == torch.bfloat16 else "float", "THREADS": self.threads, "MIN_BLOCKS": blocks,
            "VALUES": self._n_values, "ROW": self._n_values + self._n_states, "N_OPS": len(ops),
            "RATES": len(self.strides), "STRIDES": _braces(self.strides.tolist()),
            "SPANS": _braces([_braces(span) for span in spans]),
            "NORMED": max(normed, self.width), "INNER": inner, "LOW": low, "Y": y, "WIDTH": self.width,
            "EMBEDDING_AT": self.embedding_at, "LOGITS_AT": self.logits_at, "GUIDED": int(guided),
            "CASES": " ".join(f"case {number}: {call}; break;" for call, number in cases.items()),
        }  # fmt: skip
        with torch.cuda.device_of(self.weights):
            self.kernel = nvrtc.kernel(_source(tuple(macros.items())), "write_on", device)

    def _joined(self) -> tuple[list[list[int]], list[list[int]]]:
        """Instructions and spans, with what keeps or adds to a Mamba block's result made part of its instruction."""
        joined: list[list[int]] = []
        spans = []
        for first, last in self.spans.tolist():
            begin = len(joined)
            for op in self.ops[first:last].tolist():
                block = joined[-1] if len(joined) > begin and joined[-1][0] == MAMBA else None
                if block and op[0] == ADD and op[1] == block[1] and block[12] == block[13] == _NONE:
                    block[13] = op[2]
                elif block and op[0] == COPY and op[2] == block[1] and block[12] == _NONE:
                    block[12] = op[1]
                else:
                    joined.append([*op, _NONE, _NONE])
            spans.append([begin, len(joined)])
        return joined, spans

    def _case(self, op: list[int]) -> str | None:
        """The call that is compiled for an instruction, if it is compiled for its sizes."""
        kind, _, *sizes = op
        lanes = self._lanes_of
        if kind == MAMBA:
            M, E, N, R, W = sizes[:5]
            n_low = -(-(R + 2 * N) // 16) * 16
            centred = op[10]
            arguments = M, E, N, R, W, centred, lanes(2 * E, M), lanes(n_low, E), lanes(M, E)
            return f"mamba<{_listed(arguments)}>(p, s, rows, op)"
        if kind == MLP:
            M, inner = sizes[:2]
            return f"mlp<{_listed((M, inner, op[10], lanes(inner, M), lanes(M, inner)))}>(p, s, op)"
        if kind == LINEAR:
            n_in, n_out = sizes[0], sizes[2]
            return f"linear<{_listed((n_in, n_out, lanes(n_out, n_in)))}>(p, s, op)"
        if kind == NORM:
            return f"norm_in_place<{_listed((sizes[0], op[10]))}>(p, s, op)"
        return None

    def _lanes_of(self, n_out: int, n_in: int) -> int:
        return _lanes(n_out, n_in, self.per_load)

    def _laid_out(self, weight: Tensor) -> Tensor:
        """In the order in which threads read: (steps, passes, threads, elements of a load). See Product of write.cu."""
        n_out, n_in = weight.shape
        lanes = self._lanes_of(n_out, n_in)
        pieces, slots = -(-n_in // self.per_load), self.threads // lanes
        passes = -(-n_out // slots)
        filled = F.pad(weight.detach(), (0, pieces * self.per_load - n_in, 0, passes * slots - n_out))
        return filled.view(passes, slots, pieces // lanes, lanes, self.per_load).permute(2, 0, 1, 3, 4)

    def _matrix(self, *tensors: Tensor) -> int:
        """Each begins where 8 elements can be moved at once."""
        return super()._matrix(*(F.pad(flat := tensor.flatten(), (0, -len(flat) % 8)) for tensor in tensors))

    def _weight(self, *tensors: Tensor) -> int:
        """Each begins where 4 numbers can be moved at once."""
        return super()._weight(*(F.pad(flat := x.detach().flatten(), (0, -len(flat) % 4)) for x in tensors))

    def _by_state(self, x: Tensor) -> Tensor:
        """States in four parts, each filled up so that it can be moved at once. See States of write.cu."""
        n = x.shape[-1]
        return F.pad(x, (0, _n_states(n) - n))

    def _by_channel(self, x: Tensor, E: int, N: int) -> Tensor:
        return x.view(len(x), E, -1)[..., :N]

    def run(
        self, values: list[Tensor], position: Tensor, codes: Tensor, uniform: Tensor, config: SamplingConfig,
        guidance: float, seen: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Codes int64 (B, n), as of fused_kernel.run; uniform float64 (B, n)."""
        out = torch.empty(uniform.shape, dtype=torch.int64, device=self.device)
        n = out.shape[1]
        for first in range(0, n, AT_A_TIME):
            end, at = min(first + AT_A_TIME, n), position + first
            argument = _pack(
                values[0].data_ptr(), values[-1].data_ptr(), self.weights.data_ptr(), self.matrices.data_ptr(),
                self.ops_table.data_ptr(), at.data_ptr(), codes.data_ptr(),
                uniform.data_ptr() + 8 * first, out.data_ptr() + 8 * first,
                0 if seen is None else seen.data_ptr() + 4 * N_CODES * first,
                end - first, n, config.top_k, guidance, config.temperature, config.top_p, config.min_p,
            )  # fmt: skip
            with torch.cuda.device_of(out):
                self.kernel(len(out), self.threads, argument)
            codes = out[:, end - 1].contiguous()
        return out


def _n_states(n: int) -> int:
    """States of a channel with those that fill them up: each of four parts is 1, 2 or a multiple of 4."""
    return 4 if n <= 4 else 8 if n <= 8 else -(-n // 16) * 16


def _listed(arguments: Any) -> str:
    return ", ".join(map(str, arguments))


def _braces(items: list[Any]) -> str:
    return "{" + _listed(items) + "}"
