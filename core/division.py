"""How the processes of a training run divide it, by the flags of TrainConfig.

    (none)             each has all weights and other batches; gradients meet in DDP, or by averaging.py
    fsdp               each has a part of all weights (sharded.py)
    context_parallel   neighbours have the same batches, and each its pieces of the sequences (parallel.py)
    expert_parallel    neighbours have some of the experts each (expert_parallel.py), and all other weights as by fsdp

The last two are two ways to put the same processes into groups, of which neither asks about the other: every process
calls backward for its own part of the step's loss, and the mean of the gradients, times the number of processes, is
that of the whole. Auxiliary losses, such as the balance of experts, are of what a process has at a time.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from . import processes
from .averaging import Averaging, average_gradients
from .config import TrainConfig
from .errors import InputError
from .expert_parallel import spread_experts
from .parallel import context_parallel
from .sharded import experts_of, shard


def require_divisible(config: TrainConfig, *, cuts: bool, n_experts: int | None = None) -> None:
    """Raises InputError for a setting that the number of processes does not divide, or that is not for this training.

    cuts: as the Task's; n_experts: of each mixture of experts of the model, 0 if there is none, None if not known yet.
    """
    world = processes.count()
    for flag, n in (("context", config.context_parallel), ("expert", config.expert_parallel)):
        if world % n:
            raise InputError(
                f"--{flag}-parallel {n}: {world} processes do not divide by {n}; start a multiple of {n}, by "
                "`accelerate launch` or torchrun"
            )
    if config.context_parallel > 1 and not cuts:
        raise InputError("--context-parallel: this kind of training cannot cut its sequences; leave the flag out")
    if config.expert_parallel > 1 and n_experts is not None and (n_experts % config.expert_parallel or not n_experts):
        has = f"{n_experts} experts; give a number that divides these" if n_experts else "no experts; leave it out"
        raise InputError(f"--expert-parallel {config.expert_parallel}: a layer has {has}")
    shares = world // config.context_parallel
    if config.accumulation % shares:
        who = f"{shares} processes" if shares == world else f"{shares} groups of {config.context_parallel} processes"
        raise InputError(
            f"--accumulation {config.accumulation}: {who} share the batches of a step; give a multiple of {shares} "
            "(and divide --batch-size, if a step is to see as many sequences as before)"
        )


class Division:
    """See above. Every process makes one, with the same arguments; `sharded`: whether to divide the weights."""

    def __init__(self, config: TrainConfig, device: torch.device, *, sharded: bool):
        world = processes.count()
        self.sharded = (sharded or config.expert_parallel > 1) and world > 1
        self.context = _groups(config.context_parallel, device)
        self.experts = _groups(config.expert_parallel, device)
        # What FSDP2 and pieces of sequences do in a backward is nothing to be recorded.
        self.records = config.cuda_graph and device.type == "cuda" and not self.sharded and self.context is None
        self.averages = self.records and world > 1
        self.rank, self.shares = processes.rank() // config.context_parallel, world // config.context_parallel

    def divide(self, model: nn.Module) -> None:
        """Leave this process its part of the weights, if they are to be divided."""
        if self.sharded:
            shard(model, apart=spread_experts(model, self.experts["own"]) if self.experts else ())
        elif self.averages:  # DDP would do so
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def piece(self) -> AbstractContextManager[Any]:
        """In which the loss is computed."""
        return nullcontext() if self.context is None else context_parallel(self.context["own"])

    def averaging(self, model: nn.Module) -> Averaging | None:
        """For a recorded backward that is the only one of a step, on each process."""
        return Averaging(_trained(model), dist.group.WORLD) if self.averages else None

    def finish(self, model: nn.Module, averaged: bool) -> None:
        """After the last backward of a step: what no backward has done yet, for the gradients to be those of all.

        averaged: whether `averaging` has had a part in it.
        """
        if self.averages and not averaged:
            average_gradients(_trained(model), dist.group.WORLD)
        if self.experts and self.experts["others"].size() > 1:
            spread = [linear.weight for linear in experts_of(model) if linear.weight.requires_grad]
            average_gradients(spread, self.experts["others"].get_group())


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _groups(n: int, device: torch.device) -> DeviceMesh | None:
    """The processes in groups of n neighbours: `own` is this one's, `others` are those in its place of each group."""
    if n == 1:
        return None
    return init_device_mesh(device.type, (processes.count() // n, n), mesh_dim_names=("others", "own"))
