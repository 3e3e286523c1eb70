"""The training loop that every modality shares.

A modality describes its work as a `Task` (task.py); the loop does the rest: devices and bf16 (through Accelerate),
gradient accumulation, clipping, schedule, weight averaging, early stopping, logs, the best model, and checkpoints from
which a killed run continues to exactly the numbers of an undisturbed one. That is possible at little cost because the
batches of an epoch are a pure function of (seed, epoch): beside the weights, the optimizer and the random state, a
position is all there is to save.

Several processes (processes.py) share the batches of a step, each of which one of them makes and reads: what a step
does is the same for any number of them, short of the order in which floats are added and of what dropout draws.
Gradients go round by DDP; with `fsdp` weights, gradients and optimizer are divided, by FSDP2. With `context_parallel`
neighbours have the same batches, and each its pieces of them; with `expert_parallel` each has some of the experts
(division.py).
"""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device, set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from . import checkpoint, processes
from .backbone import aux_loss
from .config import ComputeConfig, TrainConfig
from .device import pick_device, uses_bf16
from .division import Division, require_divisible
from .errors import InputError
from .grouped import waits_for_host
from .hub import PretrainedModel
from .interrupt import deferred_interrupt
from .moe import MoE
from .optim import averaged, learning_rate, parameter_groups, warmup_cosine
from .plots import plot_curves
from .replayed import Replayed, own_stream
from .run_folder import RunFolder
from .sharded import all_weights, clip_gradients
from .task import Step, Steps, Task, steps_of_epoch
from .terminal import under_bar

LOG_EVERY = 10  # steps


@dataclass
class _Position:
    """Where training stands; saved in each checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_score: float = -math.inf
    best_epoch: int = -1
    loss_sum: float = 0.0  # of this epoch's steps so far, without auxiliary losses
    seconds: float = 0.0
    n_logged: int = 0  # records in the log: not to be told by the step, of which an epoch's end logs a second one
    metrics: dict[str, float] = field(default_factory=dict)  # of the best epoch


def settings_of(
    config: TrainConfig, compute: ComputeConfig, *, same_kernels: bool, cuts: bool = False, n_experts: int = 0
) -> dict[str, Any]:
    """What of these determines a run's result, for its folder; and whether it can be trained so, before that is made.

    same_kernels, cuts: as the Task's; n_experts: of each mixture of experts in the model, 0 if there is none. Raises
    InputError if the device is not here, for an accumulation that the number of processes does not divide, and for
    --cuda-graph, --context-parallel and --expert-parallel where they cannot be.
    """
    device = pick_device(compute)
    processes.join()
    require_divisible(config, cuts=cuts, n_experts=n_experts)
    _require_recordable(config, same_kernels)
    return {**asdict(config), "seed": compute.seed, "device": device.type, "bf16": uses_bf16(compute, device)}


def _require_recordable(config: TrainConfig, same_kernels: bool) -> None:
    if config.cuda_graph and not same_kernels:
        raise InputError("--cuda-graph: this kind of training cannot be recorded; leave the flag out")


def train_model(
    model: PretrainedModel, task: Task, config: TrainConfig, compute: ComputeConfig, run: RunFolder, *, resume: bool
) -> dict[str, float]:
    """Train `model`, leaving its best weights in the run folder. Returns the best epoch's validation figures.

    On Ctrl-C it ends the step, saves a checkpoint and raises KeyboardInterrupt, whose message says how to go on.
    Raises InputError if the loss stops being finite, or for an accumulation that the number of processes does not
    divide, and OSError, which says how to go on, if the disk is full. Where a launcher started several processes, each
    is alone after it.
    """
    processes.join()
    with processes.watched(config.stall):
        trainer = _Trainer(model, task, config, compute, run)
        if resume:
            trainer.load_checkpoint()
        # Ctrl-C reaches several processes at unlike moments: these it ends at once.
        deferred = deferred_interrupt() if processes.count() == 1 else nullcontext(lambda: False)
        with deferred as trainer.interrupted, trainer.stream():
            try:
                metrics = trainer.run_all()
            except OSError as error:
                how = "the same command with --resume goes on from the last checkpoint"
                raise OSError(f"{error}; stopped after step {trainer.position.step}; {how}") from error
        # If DDP held the last reference to the group, whose threads may want the GIL to end, it would wait for ever.
        del trainer
        gc.collect()
        processes.leave()
    return metrics


class _Trainer:
    def __init__(self, model, task: Task, config: TrainConfig, compute: ComputeConfig, run: RunFolder):
        AcceleratorState._reset_state(reset_partial_state=True)  # a process may train twice, on other devices
        device, world = pick_device(compute), processes.count()
        require_divisible(config, cuts=task.cuts)
        _require_recordable(config, task.same_kernels)
        by_accelerate = os.environ.pop("ACCELERATE_USE_FSDP", "false") == "true"  # its config asks for FSDP
        self.accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="bf16" if uses_bf16(compute, device) else "no"
        )
        if self.accelerator.num_processes != world:
            raise InputError(
                "several processes, but none that `accelerate launch` or torchrun started: use one of these"
            )
        set_seed(compute.seed + processes.rank())
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):  # Backbone, and what else is a stack of blocks
                module.gradient_checkpointing = config.gradient_checkpointing
        model = model.to(self.accelerator.device)
        self.average = averaged(model, config.ema) if config.ema else None
        self.division = Division(config, self.accelerator.device, sharded=config.fsdp or by_accelerate)
        self.division.divide(model)
        if self.average:
            self.division.divide(self.average.module)
        groups = parameter_groups(model, config.weight_decay)
        # Torch takes long to begin an operation on divided weights; fused, a step is one.
        fused = True if self.division.sharded and self.accelerator.device.type == "cuda" else None
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=fused)
        prepared = not self.division.sharded and not self.division.averages
        self.model: Any = self.accelerator.prepare(model) if prepared else model
        self.optimizer: Any = self.accelerator.prepare(optimizer) if prepared else optimizer
        self.parameters = list(self.model.parameters())
        self.task, self.config, self.run = task, config, run
        self.position = _Position()
        self.replayed, self.averaging = None, self.division.averaging(self.bare_model)
        if self.division.records:
            self._require_no_waiting()
            self.replayed = Replayed(self.fresh_gradients, self.accelerator.device)
        self.main = processes.is_first()
        self.interrupted: Callable[[], bool] = lambda: False

    def _require_no_waiting(self) -> None:
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        rows = torch.empty(0, dtype=dtype, device=self.accelerator.device)
        if waits_for_host(rows) and any(isinstance(module, MoE) for module in self.bare_model.modules()):
            raise InputError(
                "--cuda-graph: a mixture of experts can be recorded in bf16, on a GPU of compute capability 9 and up; "
                "leave the flag out"
            )

    @property
    def bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def best_candidate(self) -> Any:
        """The model that is evaluated and saved."""
        return self.average.module if self.average else self.bare_model

    @property
    def to_save(self) -> Mapping[str, torch.nn.Module]:
        return {"model": self.bare_model} | ({"average": self.average} if self.average else {})

    # The loop

    def run_all(self) -> dict[str, float]:
        position, config = self.position, self.config
        if self.main:
            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=position.step)
        began = time.monotonic() - position.seconds
        while position.epoch < config.epochs and not self.out_of_patience():
            losses = self.run_epoch(began)
            best = self.best_candidate.eval()
            with torch.no_grad(), self.accelerator.autocast(), all_weights(best):
                metrics = self.task.evaluate(best)
            self.finish_epoch(metrics, losses, began)
            self.stop_if_interrupted()
        if self.main:
            self.board.close()
            plot_curves(self.run / "curves.png", self.run.read_log())
        return position.metrics

    def out_of_patience(self) -> bool:
        waited = self.position.epoch - 1 - self.position.best_epoch
        return 0 < self.config.patience <= waited

    def run_epoch(self, began: float) -> float:
        """Train to the end of the epoch. Returns its mean loss."""
        position, config = self.position, self.config
        plan, mine = self.task.plan(position.epoch), (self.division.rank, self.division.shares)
        steps = steps_of_epoch(plan, config.accumulation, *mine)
        todo = Steps(self.task, steps[position.step_in_epoch :], position.epoch)
        # A generator of its own: each new iterator draws a seed, and one more draw would shift a resumed run's dropout.
        loader = DataLoader(todo, batch_size=None, num_workers=config.workers, generator=torch.Generator())
        recent: list[Tensor] = []
        named = f"epoch {position.epoch + 1}/{config.epochs}"
        for step in under_bar(loader, named, "steps", position.step_in_epoch, len(steps)):
            processes.moved(position.step + 1)
            progress = (position.epoch + position.step_in_epoch / len(steps)) / config.epochs
            recent.append(self.step(step, progress))
            position.step += 1
            position.step_in_epoch += 1
            saving = position.step % config.save_every == 0 or self.interrupted()
            if len(recent) == LOG_EVERY or saving or position.step_in_epoch == len(steps):
                self.log_losses(recent, progress)
                recent = []
            if saving:
                position.seconds = time.monotonic() - began
                self.save_checkpoint()
                self.stop_if_interrupted()
        return position.loss_sum / len(steps)

    def stop_if_interrupted(self) -> None:
        if self.interrupted():
            raise KeyboardInterrupt(f"step {self.position.step} is saved; the same command with --resume goes on")

    def step(self, step: Step, progress: float) -> Tensor:
        """One optimizer step over the accumulated batches.

        Returns this process's share of the mean loss and of the mean of the model's auxiliary losses, (2,), still on
        the device.
        """
        self.model.train()
        factor = warmup_cosine(progress, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(group, self.config.lr, factor)
        total = torch.zeros(2, device=self.accelerator.device)
        each_one = len(step.batches) == 1 and step.n_all == self.division.shares
        averaged = self.averaging is not None and each_one  # in the backward
        for i, batch in enumerate(step.batches):
            last = i + 1 == len(step.batches)
            if self.replayed is None:
                total += self.backward(batch, step.n_all, last=last, counts=i < step.n_own)
            elif i < step.n_own:
                total += self.replayed_backward((batch, step.n_all, averaged), first=i == 0, last=last)
        self.division.finish(self.bare_model, averaged)
        if self.division.sharded:
            clip_gradients(self.model.parameters(), self.config.clip)
        else:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.bare_model)
        return total

    def backward(self, batch: Any, n: int, *, last: bool = True, counts: bool = True) -> Tensor:
        """Add to the gradients those of one of n batches. Returns its share of the losses, (2,).

        last: of this process's batches in the step, when the gradients of all processes meet. counts: or whether it is
        here for that alone.
        """
        batch = send_to_device(batch, self.accelerator.device)
        with self.accelerator.autocast(), self.division.piece():
            loss = self.task.loss(self.model, batch)
            auxiliary = loss.new_zeros(()) + aux_loss(self.model) / self.config.context_parallel
            parts = torch.stack((loss, auxiliary)) / n
        if not counts:
            parts = parts * 0
        if self.division.sharded:
            self.model.set_requires_gradient_sync(last)
        with nullcontext() if last or self.division.sharded else self.accelerator.no_sync(self.model):
            # The mean over the processes is taken of what is to be a sum.
            self.accelerator.backward(parts.sum() * processes.count())
        return parts.detach()

    def fresh_gradients(self, inputs: tuple[Any, int, bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The losses and the gradients of one of n batches alone: what is recorded as a CUDA graph.

        inputs: the batch, n, and whether the gradients are to be the mean of all processes'.
        """
        batch, n, averaged = inputs
        self._set_gradients([None] * len(self.parameters))
        with self.averaging.on() if self.averaging and averaged else nullcontext():
            parts = self.backward(batch, n)
        return parts, [p.grad for p in self.parameters]

    def replayed_backward(self, inputs: tuple[Any, int, bool], *, first: bool, last: bool) -> Tensor:
        """`backward` by a graph, once there is one for batches of this shape. first, last: of the step's.

        inputs: as of `fresh_gradients`.
        """
        assert self.replayed is not None
        so_far = [p.grad for p in self.parameters]
        parts, found = self.replayed(inputs)
        if not (first and last):  # the next batch's are written over these
            found = [_sum(old, new) for old, new in zip(so_far, found, strict=True)]
        self._set_gradients(found)
        return parts

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def stream(self) -> AbstractContextManager[None]:
        """In which all of the training runs."""
        return nullcontext() if self.replayed is None else own_stream(self.accelerator.device)

    # What is left behind

    def log_losses(self, recent: list[Tensor], progress: float) -> None:
        shares = torch.stack(recent)
        if processes.count() > 1:
            torch.distributed.all_reduce(shares)
        losses, auxiliary = shares.T.tolist()
        if not all(map(math.isfinite, losses + auxiliary)):
            raise InputError(f"the loss is not finite at step {self.position.step}; try a lower --lr")
        self.position.loss_sum += math.fsum(losses)
        figures = {"train_loss": math.fsum(losses) / len(losses)}
        if any(auxiliary):
            figures["aux_loss"] = math.fsum(auxiliary) / len(auxiliary)
        self.log({**figures, "lr": self.config.lr * warmup_cosine(progress, self.config.warmup)})

    def finish_epoch(self, metrics: dict[str, float], train_loss: float, began: float) -> None:
        position, score = self.position, self.task.score(metrics)
        better = score > position.best_score
        position.seconds = time.monotonic() - began
        self.log({"epoch_train_loss": train_loss, **metrics, "seconds": round(position.seconds, 2)})
        if self.main:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            note = "  best" if better else ""
            print(f"epoch {position.epoch + 1:>3}  train_loss {train_loss:.4f}  {figures}{note}", file=sys.stderr)
        if better:
            position.best_score, position.best_epoch, position.metrics = score, position.epoch, metrics
            if self.main or self.division.sharded:
                self.best_candidate.save_pretrained(self.run.path)
        position.epoch, position.step_in_epoch, position.loss_sum = position.epoch + 1, 0, 0.0
        self.save_checkpoint()

    def log(self, figures: dict[str, float]) -> None:
        if not self.main:
            return
        self.run.append_log({"step": self.position.step, "epoch": self.position.epoch + 1, **figures})
        self.position.n_logged += 1
        for name, value in figures.items():
            self.board.add_scalar(name, value, self.position.step)

    def save_checkpoint(self) -> None:
        states, position = checkpoint.random_states(self.accelerator.device), asdict(self.position)
        self.run.save_checkpoint(
            self.position.step,
            lambda folder: checkpoint.save(folder, self.to_save, self.optimizer, position, states),
        )

    def load_checkpoint(self) -> None:
        """Go back to the newest checkpoint; to the very start if the run was killed before its first one."""
        latest = self.run.latest_checkpoint()
        if latest is not None:
            position = checkpoint.load(latest, self.to_save, self.optimizer, self.accelerator.device)
            self.position = _Position(**position)
        if self.main:
            self.run.rewind_log(self.position.n_logged)


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """In memory of its own."""
    if old is None or new is None:
        return old if new is None else new.clone()
    return old + new
