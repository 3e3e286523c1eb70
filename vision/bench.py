"""How many images a second a model trains on and judges on this machine, in how much memory.

    training   forward, cross-entropy, backward, clipping, AdamW, moving average; with bf16 under autocast
    forward    logits, no gradients; with bf16 the weights and images are in bf16, too
               (a little faster than the autocast of `predict` and `eval`, which leaves the weights as they are stored)

The limit: a batch cannot take less time than its matrix products and convolutions would take, all of them, at the rate
at which this device multiplies large matrices in the same precision. Scans are not counted, nor is anything else that
is no product of matrices, so that even a perfect program would stay below 100 %.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.speed import median_seconds, training_step, with_peak
from .config import PRESETS, VimConfig

MULTIPLIED = {"cpu": 1024, "cuda": 8192}  # sides of the matrices that give the rate of multiplying
Call = Callable[[Tensor], Tensor]  # images -> logits
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One line of the table. Seconds of a batch are medians; None: it did not fit into the device's memory."""

    model: str
    work: str  # training or forward
    run: str  # eager or compiled
    batch: int
    pixels: tuple[int, int]  # height, width
    seconds: float | None
    peak_bytes: int | None  # of the device's memory, or of the process on a CPU; None where it cannot be told
    share_of_limit: float | None

    @property
    def images_per_second(self) -> float | None:
        return self.batch / self.seconds if self.seconds else None


def create(name: str, size: int | None = None) -> nn.Module:
    """timm's model of this name, perhaps for images of other than its own size; random weights."""
    cfg = timm.get_pretrained_cfg(name)
    resized = isinstance(PRESETS.get(name), VimConfig) or (cfg is not None and cfg.fixed_input_size)
    sized: dict[str, Any] = {"img_size": size} if size is not None and resized else {}
    return timm.create_model(name, **sized)


def forward_step(call: Call, images: Tensor) -> Step:
    """call: the model, perhaps compiled; images (B, C, H, W), as all below."""

    def step() -> Tensor:
        with torch.no_grad():
            return call(images)

    return step


def backward_step(call: Call, images: Tensor, labels: Tensor, bf16: bool) -> Step:
    """Forward, cross-entropy with labels (B,), and backward."""

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(call(images), labels)
        loss.backward()

    return step


def products(step: Step) -> int:
    """Floating-point operations of a step's matrix products and convolutions, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def multiplication_rate(device: torch.device, bf16: bool, repeats: int) -> float:
    """Floating-point operations a second of a product of large square matrices."""
    side = MULTIPLIED["cpu" if device.type == "cpu" else "cuda"]
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * side**3 / median_seconds(lambda: a @ b, device, repeats)


def measure(
    model: nn.Module, name: str, shape: tuple[int, int, int, int], *, bf16: bool, compiled: bool, repeats: int,
    rate: float,
) -> Iterator[Speed]:  # fmt: skip
    """Each line as soon as it is known, training first: the model is left in the precision of its forward.

    shape  B, C, H, W of the random images        rate  see `multiplication_rate`
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(int(model.num_classes), shape[:1], generator=generator).to(device)  # pyright: ignore
    calls: list[tuple[str, Call]] = [("eager", model)]
    if compiled:
        calls.append(("compiled", torch.compile(model)))  # pyright: ignore[reportArgumentType]

    def timed(step_of: Callable[[Call], Step], call: Call) -> float:
        return median_seconds(step_of(call), device, repeats, warm_ups=2)

    def lines(work: str, step_of: Callable[[Call], Step]) -> Iterator[Speed]:
        n_operations, _ = with_peak(lambda: products(step_of(model)), device)
        for run, call in calls:
            seconds, peak = with_peak(partial(timed, step_of, call), device)
            model.zero_grad()  # of a step that did not fit
            share = n_operations / rate / seconds if n_operations and seconds else None
            figures: dict[str, Any] = {"seconds": seconds, "peak_bytes": peak, "share_of_limit": share}
            yield Speed(model=name, work=work, run=run, batch=shape[0], pixels=shape[2:], **figures)

    model.train()
    yield from lines("training", lambda call: training_step(model, backward_step(call, images, labels, bf16)))
    model.eval()
    dtype = torch.bfloat16 if bf16 else torch.float32
    model, images = model.to(dtype), images.to(dtype)
    yield from lines("forward", lambda call: forward_step(call, images))
    torch.compiler.reset()
