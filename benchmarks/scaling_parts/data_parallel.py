"""Models that every GPU has, or a part of, with batches of its own: the byte language model and VMamba-T."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F

import polymamba.vision  # noqa: F401 - registers vmamba_* in timm
from polymamba.bytes import ByteLM

from .bench import Bench
from .sizes import byte_model
from .steps import build, parallel, parameters, recorded_step, train_step

AFTER, MEANWHILE = "recorded, gradients after it", "recorded, gradients meanwhile"


def language_models(bench: Bench) -> None:
    s = bench.sizes

    def model() -> torch.nn.Module:
        return ByteLM(byte_model(s.lm))

    def batch_of(size: int) -> torch.Tensor:
        return torch.randint(256, (size, s.lm_length + 1), device=bench.device)

    def loss_of(net: Any, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    bench.table(f"Byte language model of {parameters(build(bench, model))}, sequences of {s.lm_length:,}", "tokens")
    _weak_and_strong(bench, model, batch_of, loss_of, s.lm_batch, s.lm_length, (AFTER, "ddp", "fsdp", MEANWHILE))


def images(bench: Bench) -> None:
    s = bench.sizes

    def model() -> torch.nn.Module:
        return timm.create_model(s.image_model, num_classes=1000)

    def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(size, 3, s.image_size, s.image_size, device=bench.device)
        return x, torch.randint(1000, (size,), device=bench.device)

    def loss_of(net: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(net(batch[0]).float(), batch[1])

    bench.table(f"{s.image_model}, {parameters(build(bench, model))}, {s.image_size} x {s.image_size}", "images")
    _weak_and_strong(bench, model, batch_of, loss_of, s.image_batch, 1, (AFTER, "ddp", MEANWHILE))


def _weak_and_strong(
    bench: Bench,
    model: Callable[[], torch.nn.Module],
    batch_of: Callable[[int], Any],
    loss_of: Callable[[Any, Any], torch.Tensor],
    size: int,
    units: int,
    kinds: Sequence[str],
) -> None:
    """size: of the batch of each GPU, weak; units: tokens, or images, of an item of a batch."""
    works = {  # name: batches of a GPU, size of each, size of them all
        "weak": (lambda n: 1, lambda n: size, lambda n: n * size),
        "strong": (lambda n: 1, lambda n: max(1, 4 * size // n), lambda n: 4 * size),
        # What is too much for one GPU at once, in batches of twice the size.
        "strong, added up": (lambda n: max(1, 8 // n), lambda n: 2 * size, lambda n: 16 * size),
    }
    of_one: dict[str, float | None] = {}
    for how in kinds:
        for name, (n_batches, own, total) in works.items():
            if how == MEANWHILE and n_batches(1) > 1:
                continue

            def make(n: int, how=how, n_batches=n_batches, own=own) -> Callable[[], object]:
                net = build(bench, model)
                batches = [batch_of(own(n)) for _ in range(n_batches(n))]
                if how in (AFTER, MEANWHILE):
                    return recorded_step(bench, net, loss_of, batches, n, meanwhile=how == MEANWHILE)
                return train_step(bench, parallel(bench, net, n, how), loss_of, batches)

            alone_as = {"fsdp": "ddp", MEANWHILE: AFTER}.get(how)  # what it is on one GPU, too
            one = of_one.get(f"{name}: {alone_as}")
            label = f"{name}: {how}"
            of_one[label] = bench.series(
                label, lambda n, total=total: total(n) * units, make, first=2 if alone_as else 1, one=one
            )
