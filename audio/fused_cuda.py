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
from .fused_kernel import LINEAR, MAMBA, MLP, NORM
from .model import AudioModel

THREADS = 512  # of a block; another number is another order of sums
STREAMS = 1
AT_A_TIME = 2048  # samples of a launch: about a second at most, so that a user can stop it
_FIRST = 8  # the number of the first case that is compiled for its sizes: behind those of fused_kernel.py
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_SOURCES = (_COMMON / "device.cu", _COMMON / "numbers.cu", Path(__file__).parent / "cuda_kernels" / "write.cu")
_pack = struct.Struct("14q4d").pack  # struct Problem of write.cu


@cache
def _source(macros: tuple[tuple[str, Any], ...]) -> str:
    parts = [f"#define {name} {value}" for name, value in macros]
    return "\n".join([*parts, *(path.read_text() for path in _SOURCES)]) + "\n"


def _lanes(n_out: int, n_in: int, per_load: int) -> int:
    """Threads that share a row of a matrix: as few loads of a thread as can be, then as little else to do.

    A thread reads its part of the input once for all of its rows; sums over lanes it makes for each.
    """
    pieces = -(-n_in // per_load)

    def cost(log2: int) -> tuple[int, int]:
        passes, steps = -(-(n_out << log2) // THREADS), pieces >> log2
        return passes * steps, 2 * steps + passes * log2

    return 1 << min((log2 for log2 in range(6) if pieces % (1 << log2) == 0), key=cost)


class CudaModel(FusedModel):
    """A model's tables on its GPU, and the kernel for them. Raises nvrtc.Unavailable if there can be none."""

    def __init__(self, model: AudioModel, *, guided: bool):
        self.dtype = torch.bfloat16 if torch.is_autocast_enabled(model.head.weight.device.type) else torch.float32
        self.per_load = 16 // self.dtype.itemsize
        super().__init__(model)
        device = self.weights.get_device()
        if not selective_scan.usable(device):
            raise nvrtc.Unavailable("this GPU or this PyTorch has no NVRTC kernels")
        cases: dict[str, int] = {}
        ops = self.ops.tolist()
        blocks = [op for op in ops if op[0] == MAMBA]
        for op, after in zip(blocks, [*blocks[1:], blocks[0]], strict=True):
            op += [after[11], 2 * after[2] * after[3] * self.dtype.itemsize]  # the next one's in_proj, to be asked for
        for op in ops:
            op += [0] * (14 - len(op))
            if (case := self._case(op)) is not None:
                op[0] = cases.setdefault(case, _FIRST + len(cases))
        self.ops_table = torch.tensor(ops, dtype=torch.int32, device=self.device)
        normed, inner, low, y = self.sizes.tolist()
        macros = {
            "T": "bf16" if self.dtype == torch.bfloat16 else "float", "THREADS": THREADS,
            "VALUES": self._n_values, "ROW": self._n_values + self._n_states, "N_OPS": len(ops),
            "RATES": len(self.strides), "STRIDES": _braces(self.strides.tolist()),
            "SPANS": _braces([_braces(span) for span in self.spans.tolist()]),
            "NORMED": max(normed, self.width), "INNER": inner, "LOW": low, "Y": y, "WIDTH": self.width,
            "EMBEDDING_AT": self.embedding_at, "LOGITS_AT": self.logits_at, "GUIDED": int(guided),
            "CASES": " ".join(f"case {number}: {call}; break;" for call, number in cases.items()),
        }  # fmt: skip
        self._macros = tuple(macros.items())
        self._kernel(1)

    def _kernel(self, streams: int) -> Any:
        """The kernel that has so many recordings in a block."""
        with torch.cuda.device_of(self.weights):
            source = _source((*self._macros, ("STREAMS", streams)))
            return nvrtc.kernel(source, "write_on", self.weights.get_device())

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
        pieces, slots = -(-n_in // self.per_load), THREADS // lanes
        passes = -(-n_out // slots)
        filled = F.pad(weight.detach(), (0, pieces * self.per_load - n_in, 0, passes * slots - n_out))
        return filled.view(passes, slots, pieces // lanes, lanes, self.per_load).permute(2, 0, 1, 3, 4)

    def _matrix(self, *tensors: Tensor) -> int:
        """Each begins where 8 elements can be moved at once."""
        return super()._matrix(*(F.pad(flat := tensor.flatten(), (0, -len(flat) % 8)) for tensor in tensors))

    def run(
        self, values: list[Tensor], position: Tensor, codes: Tensor, uniform: Tensor, config: SamplingConfig,
        guidance: float, seen: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Codes int64 (B, n), as of fused_kernel.run; uniform float64 (B, n)."""
        out = torch.empty(uniform.shape, dtype=torch.int64, device=self.device)
        n = out.shape[1]
        streams = self._streams(position)
        kernel = self._kernel(streams)
        for first in range(0, n, AT_A_TIME):
            end = min(first + AT_A_TIME, n)
            at = position + first
            argument = _pack(
                values[0].data_ptr(), values[-1].data_ptr(), self.weights.data_ptr(), self.matrices.data_ptr(),
                self.ops_table.data_ptr(), at.data_ptr(), codes.data_ptr(),
                uniform.data_ptr() + 8 * first, out.data_ptr() + 8 * first,
                0 if seen is None else seen.data_ptr() + 4 * N_CODES * first,
                len(out), end - first, n, config.top_k, guidance, config.temperature, config.top_p, config.min_p,
            )  # fmt: skip
            with torch.cuda.device_of(out):
                kernel(-(-len(out) // streams), THREADS, argument)
            codes = out[:, end - 1].contiguous()
        return out

    def _streams(self, position: Tensor) -> int:
        """Recordings of a block: they must stand at the same place of the period."""
        if STREAMS == 1 or (position % int(self.strides[-1])).unique().numel() > 1:
            return 1
        return STREAMS


def _listed(arguments: Any) -> str:
    return ", ".join(map(str, arguments))


def _braces(items: list[Any]) -> str:
    return "{" + _listed(items) + "}"
