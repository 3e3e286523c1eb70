"""A mixture of experts: all of them on each GPU, or spread."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from polymamba.bytes import ByteLM
from polymamba.core import aux_loss
from polymamba.core.expert_parallel import spread_experts
from polymamba.core.sharded import shard

from .bench import Bench
from .sizes import byte_model
from .steps import build, parallel, parameters, train_step


def experts(bench: Bench) -> None:
    s = bench.sizes
    length = s.lm_length

    def model() -> torch.nn.Module:
        return ByteLM(byte_model(s.experts))

    def make(how: str) -> Callable[[int], Callable[[], object]]:
        def made(n: int) -> Callable[[], object]:
            net: Any = build(bench, model)
            if how == "spread" and n > 1:
                mesh = bench.mesh(n)
                shard(net, mesh, apart=spread_experts(net, mesh))
            else:
                net = parallel(bench, net, n, "ddp")
            generator = torch.Generator(bench.device).manual_seed(bench.rank)
            shape = (s.experts_batch, length + 1)
            tokens = torch.randint(256, shape, device=bench.device, generator=generator)

            def loss_of(net: Any, _: None) -> torch.Tensor:
                logits = net(tokens[:, :-1]).flatten(0, 1).float()
                return F.cross_entropy(logits, tokens[:, 1:].flatten()) + aux_loss(net)

            return train_step(bench, net, loss_of)

        return made

    n_experts, title = s.experts.moe.n_experts, parameters(build(bench, model))
    bench.table(f"MoE-Mamba of {title}, {n_experts} experts a layer, weak", "tokens")
    for name, how in (("each GPU has all experts (ddp)", "ddp"), ("experts spread, the rest fsdp", "spread")):
        bench.series(name, lambda n: n * s.experts_batch * length, make(how))
