"""One synthetic task, one model: train it, test it, write what came of it.

    python benchmarks/tasks/run.py selective-copying --mixer mamba --folder runs/tasks [--minutes 8]

Leaves FOLDER/NAME.json (settings, curve, tests, machine), NAME.md, NAME.png and NAME.safetensors, a checkpoint from
which the same command goes on if it was killed, or if --minutes or --steps is raised. `report.py` makes the tables and
pictures of all runs in a folder. Training ends with --steps or --minutes, whatever comes first, and the learning rate
(linear up, half a cosine down) follows whichever of the two is further.
"""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from generators import Batch, associative_recall, copying, induction_heads, ngram_lookup, selective_copying
from listops import NAMES, listops
from report import plot_run, table_of_run
from training import SAVE_EVERY, Training, build

from polymamba.core.files import write_json, write_text
from polymamba.core.optim import warmup_cosine

sys.path.append(str(Path(__file__).parents[1]))
from machine import describe

PRINT_EVERY = 10  # seconds
Make = Callable[[int, torch.Generator], Batch]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every task has. On the command line every field is a flag."""

    mixer: Literal["mamba", "s4d", "lru", "attention", "hybrid"] = "mamba"
    folder: Path = Path("runs/tasks")
    d_model: int = 64
    n_layer: int = 2
    d_state: int = 16
    """Of Mamba layers."""
    rope: bool = True
    """Attention has rotary positions; otherwise none but causality."""
    steps: int = 1_000_000
    minutes: float = 8.0
    """Of training, at most, all the times together that the run was gone on with."""
    batch: int = 64
    lr: float = 2e-3
    warmup: float = 0.03
    """Share of the training in which the learning rate rises."""
    weight_decay: float = 0.0
    dropout: float = 0.0
    bf16: bool = False
    """bfloat16 matrix products (autocast) instead of TF32."""
    graph: bool = True
    """On a GPU, a step is one CUDA graph."""
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    pooled = False  # read at the places themselves, not from the mean of all before them
    levels = 1  # of the curriculum; from each to the next when 99 % are right, or when its time is over

    def make(self, level: int) -> Make:
        """The training sequences of a level."""
        raise NotImplementedError

    def batch_at(self, level: int) -> int:
        return self.batch

    def tests(self) -> list[tuple[int, int, Make]]:
        """(what the table's column says, sequences, what makes them)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Growing(Run):
    """A curriculum: sequences of first_length tokens, then twice as long, and again, up to `length`."""

    length: int
    first_length: int

    @property
    def lengths(self) -> list[int]:
        return [n for n in (self.first_length << i for i in range(20)) if n < self.length] + [self.length]

    @property
    def levels(self) -> int:
        return len(self.lengths)

    def batch_at(self, level: int) -> int:
        """More of the short ones."""
        return self.batch * min(4, self.length // self.lengths[level])


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Growing):
    """Mamba, E.1, table 1: the answers' markers are among the length."""

    length: int = 4096
    first_length: int = 64
    memorised: int = 16
    vocab_size: int = 16

    def make(self, level: int) -> Make:
        return lambda n, g: selective_copying(n, self.lengths[level], self.memorised, self.vocab_size, g)

    def tests(self) -> list[tuple[int, int, Make]]:
        return [(length, 512, self.make(level)) for level, length in enumerate(self.lengths)]


@dataclass(frozen=True, kw_only=True)
class InductionHeads(Growing):
    """Mamba, E.1, tables 2 and 11: trained at 256, tested far beyond; the loss is of the last token alone."""

    length: int = 256
    first_length: int = 16
    vocab_size: int = 16
    longest: int = 1 << 20

    def make(self, level: int) -> Make:
        return lambda n, g: induction_heads(n, self.lengths[level], self.vocab_size, g)

    def tests(self) -> list[tuple[int, int, Make]]:
        lengths = [n for n in (1 << i for i in range(6, 21)) if n <= self.longest]
        return [
            (
                length,
                min(1024, max(64, (1 << 23) // length)),
                lambda n, g, L=length: induction_heads(n, L, self.vocab_size, g),
            )
            for length in lengths
        ]


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Run):
    """MQAR of Zoology: numbers of pairs mixed in training, more of them from level to level, and far more in tests."""

    length: int = 256
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    vocab_size: int = 8192

    @property
    def levels(self) -> int:
        return len(self.pairs)

    def _length(self, level: int) -> int:
        return max(self.length * self.pairs[level] // self.pairs[-1], 64)

    def make(self, level: int) -> Make:
        return lambda n, g: associative_recall(n, self._length(level), self.pairs[: level + 1], self.vocab_size, g)

    def batch_at(self, level: int) -> int:
        """More of the short ones."""
        return self.batch * (self.length // self._length(level))

    def tests(self) -> list[tuple[int, int, Make]]:
        sizes = [p for p in (4, 8, 16, 32, 64, 128, 256) if p <= 4 * max(self.pairs)]
        return [
            (p, 512, lambda n, g, p=p: associative_recall(n, max(64, 4 * p), (p,), self.vocab_size, g)) for p in sizes
        ]


@dataclass(frozen=True, kw_only=True)
class Copying(Run):
    """Repeat After Me: strings of up to `longest` letters, tested beyond."""

    rope: bool = False
    shortest: int = 1
    longest: int = 100
    tested: tuple[int, ...] = (10, 25, 50, 75, 100, 125, 150, 200, 300, 500, 1000)
    vocab_size = 28

    def make(self, level: int) -> Make:
        return lambda n, g: copying(n, self.shortest, self.longest, g)

    def tests(self) -> list[tuple[int, int, Make]]:
        return [(length, 256, lambda n, g, L=length: copying(n, L, L, g)) for length in self.tested]


@dataclass(frozen=True, kw_only=True)
class NgramLookup(Run):
    """Repeat After Me: the letters that follow a key, which comes after the string (suffix) or before it (prefix)."""

    rope: bool = False
    key: Literal["suffix", "prefix"] = "suffix"
    n_key: int = 3
    n_answer: int = 3
    shortest: int = 10
    longest: int = 100
    tested: tuple[int, ...] = (10, 25, 50, 75, 100, 125, 150, 200, 300, 500, 1000)
    vocab_size = 28

    def _make(self, shortest: int, longest: int) -> Make:
        return lambda n, g: ngram_lookup(n, shortest, longest, self.n_key, self.n_answer, self.key == "prefix", g)

    def make(self, level: int) -> Make:
        return self._make(self.shortest, self.longest)

    def tests(self) -> list[tuple[int, int, Make]]:
        return [(length, 256, self._make(length, length)) for length in self.tested]


@dataclass(frozen=True, kw_only=True)
class ListOps(Run):
    """Long Range Arena's: 96,000 examples to learn from, 2,000 others to test. Read from the mean of a sequence."""

    pooled = True

    d_model: int = 128
    n_layer: int = 4
    batch: int = 32
    weight_decay: float = 0.05
    shortest: int = 500
    longest: int = 2000
    most_depth: int = 10
    examples: int = 96_000
    vocab_size = len(NAMES)

    def _examples(self, n: int, seed: int) -> Batch:
        return listops_on(self.device, n, seed, self.shortest, self.longest, self.most_depth)

    def make(self, level: int) -> Make:
        def some(n: int, g: torch.Generator) -> Batch:
            tokens, places, answers = self._examples(self.examples, 1000 + self.seed)
            rows = torch.randint(len(tokens), (n,), generator=g, device=tokens.device)
            return Batch(tokens[rows].long(), places[rows], answers[rows])

        return some

    def tests(self) -> list[tuple[int, int, Make]]:
        def held_out(n: int, g: torch.Generator) -> Batch:
            tokens, places, answers = self._examples(n, 1)
            return Batch(tokens.long(), places, answers)

        return [(self.longest, 2000, held_out)]


@cache
def listops_on(device: str, n: int, seed: int, shortest: int, longest: int, most_depth: int) -> Batch:
    """All examples, kept on the device, tokens as bytes."""
    tokens, lengths, answers = (torch.from_numpy(x).to(device) for x in listops(n, seed, shortest, longest, most_depth))
    return Batch(tokens, lengths[:, None] - 1, answers[:, None])


TASKS = {
    "selective-copying": SelectiveCopying,
    "induction-heads": InductionHeads,
    "associative-recall": AssociativeRecall,
    "copying": Copying,
    "ngram-lookup": NgramLookup,
    "listops": ListOps,
}


def name_of(task: str, run: Run) -> str:
    key = f"-{run.key}" if isinstance(run, NgramLookup) else ""
    rope = "" if run.rope or run.mixer not in ("attention", "hybrid") else "-nope"
    decay = f"-w{run.weight_decay:g}" if run.weight_decay else ""
    size = f"d{run.d_model}-n{run.d_state}-l{run.n_layer}"
    return f"{task}{key}-{run.mixer}{rope}-{size}-lr{run.lr:g}{decay}-s{run.seed}"


def settings_of(run: Run) -> dict:
    return {k: v for k, v in json.loads(json.dumps(asdict(run), default=str)).items() if k != "folder"}


def train(run: Run, training: Training, checkpoint: Path, name: str) -> None:
    saved = training.seconds

    def progress() -> float:
        return max(training.steps / run.steps, training.seconds / (60 * run.minutes))

    printed = training.seconds
    while progress() < 1:
        level = training.level
        factor = warmup_cosine(max(progress(), 1e-4), run.warmup)
        accuracy = training.block(run.make(level), run.batch_at(level), factor)
        if level + 1 < run.levels and (accuracy > 0.99 or progress() > 0.5 * (level + 1) / run.levels):
            training.level += 1
        if training.seconds - printed > PRINT_EVERY or training.level > level:
            printed = training.seconds
            step, loss, accuracy = training.curve[-1]
            print(f"{name}: level {level}, step {step}, loss {loss:.4f}, right {accuracy:.4f}, "
                  f"{training.seconds:.0f} s", flush=True)  # fmt: skip
        if training.seconds - saved > SAVE_EVERY:
            training.save(checkpoint)
            saved = training.seconds
    training.save(checkpoint)


def main() -> None:
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(task)] for task, kind in TASKS.items())
    run: Run = tyro.cli(kinds[0] | kinds[1] | kinds[2] | kinds[3] | kinds[4] | kinds[5], description=__doc__)  # pyright: ignore
    task = next(task for task, kind in TASKS.items() if type(run) is kind)
    name = name_of(task, run)
    run.folder.mkdir(parents=True, exist_ok=True)
    result, checkpoint = run.folder / f"{name}.json", run.folder / f"{name}.safetensors"
    if result.exists() and json.loads(result.read_text())["settings"] == settings_of(run):
        print(f"{result}: there already")
        return
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(run.seed)
    model = build(run.mixer, run.vocab_size, run.d_model, run.n_layer, run.d_state, run.rope, run.dropout)  # pyright: ignore
    options = {"lr": run.lr, "weight_decay": run.weight_decay, "bf16": run.bf16, "graph": run.graph, "seed": run.seed,
               "pooled": run.pooled}  # fmt: skip
    training = Training(model, run.device, **options)
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"{name}: goes on from step {training.steps}", flush=True)
    train(run, training, checkpoint, name)
    tests = []
    for x, n, make in run.tests():
        made = make(n, torch.Generator(run.device).manual_seed(7_777_777 + x))
        tests.append({"x": x, **training.test(made)})
        print(f"{name}: {tests[-1]}", flush=True)
    every = max(1, len(training.curve) // 100)
    content = {
        "task": task,
        "settings": settings_of(run),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state": training.state_numbers(),
        "steps": training.steps,
        "minutes": round(training.seconds / 60, 2),
        "curve": [(step, round(loss, 4), round(right, 4)) for step, loss, right in training.curve[::every]],
        "tests": tests,
        "command": shlex.join(["python", "benchmarks/tasks/run.py", *sys.argv[1:]]),
        "machine": describe(),
    }
    write_json(result, content)
    write_text(run.folder / f"{name}.md", table_of_run(content))
    plot_run(run.folder / f"{name}.png", content)


if __name__ == "__main__":
    main()
