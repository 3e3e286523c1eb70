"""MoE-Mamba, Mamba and Transformer-MoE of equal active size on bytes: steps to equal loss (arXiv 2401.04081, table 9).

    python benchmarks/moe_mamba.py TEXT... --folder runs/moe_mamba [--steps 2500] [--at-once 9] [--seconds 300]

TEXT are folders with train.txt and valid.txt. Each model of each seed is trained in a process of its own, several side
by side on one device; what a run leaves is FOLDER/MODEL-SEED.json, and runs that are there already are not made again.
Then FOLDER/moe_mamba.md and moe_mamba.png say: loss against steps; how many times the steps Mamba needs for its lowest
loss, compared with each other model for the same loss; how evenly experts are used; and speed, each model alone.

As in the paper a MoE-Mamba has half of Mamba's layers and, between them, as many layers of experts 3 d_model wide; a
Transformer-MoE attention instead and experts 4 d_model wide; with --top-k, experts are narrower by as much. Unlike
there, the learning rate stays constant after the warm-up, and held-out loss is that of averaged weights: so the loss at
each step is that of a run which could have ended there, and runs that --seconds cuts short can be compared as far as
all of them came.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from machine import describe
from torch import Tensor

from polymamba.bytes import ByteLM, Documents
from polymamba.bytes.config import VOCAB_SIZE, name_of
from polymamba.bytes.documents import whole_files
from polymamba.bytes.training import TrainBytes, next_byte_loss
from polymamba.core import BackboneConfig, LanguageModelConfig, MoEConfig, TrainConfig, aux_loss, parameter_counts
from polymamba.core.optim import averaged, parameter_groups
from polymamba.core.routing import recorded_routing
from polymamba.core.routing_plot import plot_routing

MODELS = {"Mamba": "#4878a8", "MoE-Mamba": "#d1603d", "Transformer-MoE": "#3d8f5f"}
N_HELD_OUT = 128  # windows
SMOOTHING = 0.98  # of the training loss, a step


@dataclass(frozen=True)
class Setting:
    texts: tuple[str, ...]
    steps: int
    seconds: float  # at most, of a run's training
    d_model: int
    n_layer: int
    n_experts: int
    top_k: int
    normalise: bool
    batch: int
    context: int
    lr: float
    warmup: int
    every: int  # steps from one look at the held-out windows to the next
    device: str


def build(name: str, s: Setting) -> ByteLM:
    pattern = {"Mamba": ("mamba",), "MoE-Mamba": ("mamba", "moe"), "Transformer-MoE": ("attention", "moe")}[name]
    width = (4 if "attention" in pattern else 3) * s.d_model // s.top_k
    moe = MoEConfig(n_experts=s.n_experts, top_k=s.top_k, normalise=s.normalise, d_expert=width)
    backbone = BackboneConfig(d_model=s.d_model, n_layer=s.n_layer, pattern=pattern, moe=moe)
    model = ByteLM(LanguageModelConfig(backbone=backbone, vocab_size=VOCAB_SIZE, tie_embeddings=False))
    return model.to(s.device)


def documents(s: Setting, part: str) -> Documents:
    return Documents(whole_files([Path(text, f"{part}.txt") for text in s.texts]))


def batches(s: Setting, seed: int) -> Iterator[Tensor]:
    train = documents(s, "train")
    task = TrainBytes(train, documents(s, "valid"), TrainConfig(batch_size=s.batch), s.context, seed, "packed")
    for epoch in itertools.count():
        for description in task.plan(epoch):
            yield task.batch(description, epoch).to(s.device, non_blocking=True)


def held_out(s: Setting) -> Tensor:
    """Windows from all over the held-out documents, int64 (N_HELD_OUT, context + 1): the same ones for all."""
    valid = documents(s, "valid")
    starts = np.linspace(0, valid.n_tokens - s.context - 1, N_HELD_OUT).astype(int)
    return torch.from_numpy(np.stack([valid.read(i, i + s.context + 1) for i in starts])).to(s.device)


class Training:
    """A model, its optimizer and the average of its weights."""

    def __init__(self, name: str, seed: int, s: Setting):
        torch.manual_seed(seed)
        self.s, self.model = s, build(name, s)
        groups = parameter_groups(self.model, 0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95))
        self.average = averaged(self.model, 0.99)
        self.done = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.s.device, torch.bfloat16, enabled=self.s.device == "cuda")

    def step(self, ids: Tensor) -> Tensor:
        """The batch's cross-entropy in bits, on the device."""
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.s.lr * min(1, self.done / self.s.warmup)
        with self.autocast():
            loss = next_byte_loss(self.model, ids)
        (loss + aux_loss(self.model)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        return loss.detach() / math.log(2)

    @torch.no_grad()
    def held_out_bits(self, windows: Tensor) -> float:
        model = self.average.module.eval()
        with self.autocast():
            losses = [next_byte_loss(model, some) for some in windows.split(64)]
        return torch.stack(losses).mean().item() / math.log(2)


def run(name: str, seed: int, s: Setting, folder: Path) -> None:
    """Train one model; its log is there only when it is whole."""
    training, windows, data = Training(name, seed, s), held_out(s), batches(s, seed)
    losses, records, began = [], [], time.monotonic()
    for step in range(s.steps + 1):
        if step % s.every == 0 or step == s.steps:
            bits = training.held_out_bits(windows)
            records.append({"step": step, "valid": bits, "seconds": time.monotonic() - began})
            print(f"{name} {seed}: step {step}, {bits:.4f} bits, {records[-1]['seconds']:.0f} s", flush=True)
            if records[-1]["seconds"] > s.seconds:
                break
        if step < s.steps:
            losses.append(training.step(next(data)))
    train = torch.stack(losses).tolist()
    total, active = parameter_counts(training.model.backbone)
    summary = {"model": name, "seed": seed, "total": total, "active": active, "train": train, "valid": records}
    model = training.average.module.eval()
    with torch.no_grad(), training.autocast(), recorded_routing(model) as routing:
        for some in windows.split(64):
            model(some[:, :-1])
    summary["routing"] = [layer.summary() for layer in routing.layers]
    if routing.layers:
        plot_routing(folder / f"{name}-{seed}.png", routing.layers, name_of)
    beside = folder / f".{name}-{seed}.json"
    beside.write_text(json.dumps(summary))
    beside.rename(folder / f"{name}-{seed}.json")


def speed(name: str, s: Setting, n: int = 20) -> float:
    """Bytes a second of training, alone on the device."""
    training, data = Training(name, 0, s), batches(s, 0)
    some = [next(data) for _ in range(n)]
    for ids in some[:5]:
        training.step(ids)
    if s.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    last = torch.stack([training.step(ids) for ids in some])
    last.sum().item()  # waits
    return n * s.batch * s.context / (time.perf_counter() - began)


# The report


def smoothed(losses: list[float]) -> np.ndarray:
    """A moving average that begins unbiased."""
    out, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        out.append(mean / weight)
    return np.array(out)


def first_at(steps: np.ndarray, losses: np.ndarray, target: float) -> float:
    """The first step at which the loss is at most `target`, between two measured ones by a line; nan if never."""
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return math.nan
    i = below[0]
    if i == 0:
        return float(steps[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def curves(result: dict, last: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """kind of loss -> (steps, bits), up to the step `last`."""
    records = [record for record in result["valid"] if record["step"] <= last]
    train = smoothed(result["train"])[:last]
    return {
        "held out": (np.array([r["step"] for r in records]), np.array([r["valid"] for r in records])),
        "training": (np.arange(1, len(train) + 1), train),
    }


def report(s: Setting, folder: Path, results: list[dict], rates: dict[str, float]) -> None:
    last = min(result["valid"][-1]["step"] for result in results)
    n_bytes = documents(s, "train").n_bytes
    lines = ["# MoE-Mamba, Mamba and Transformer-MoE on bytes", "", *describe(), ""]
    passes, seeds = last * s.batch * s.context / n_bytes, {result["seed"] for result in results}
    lines += [
        f"d_model {s.d_model}, {s.n_layer} layers, {s.n_experts} experts, {_choice(s)}, lr {s.lr}; {last} steps of "
        f"{s.batch} x {s.context} bytes, {passes:.2f} passes over {n_bytes / 1e6:.1f} MB. Bits per byte, means of "
        f"{len(seeds)} seeds (smallest to largest), the lowest of a run. Ratio: the steps of Mamba of the same seed to "
        "its own lowest loss, divided by those of the model to the same loss.",
        "",
        "| | parameters, active, millions | held out | ratio | training | ratio | least used expert | bytes/s alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    of = {(result["model"], result["seed"]): curves(result, last) for result in results}
    for name in MODELS:
        mine = [result for result in results if result["model"] == name]
        cells = [f"{mine[0]['total'] / 1e6:.1f}, {mine[0]['active'] / 1e6:.2f}"]
        for kind in ("held out", "training"):
            lowest = [of[name, r["seed"]][kind][1].min() for r in mine]
            ratios = []
            for r in mine:
                steps, losses = of["Mamba", r["seed"]][kind]
                reached = first_at(steps, losses, losses.min())
                ratios.append(reached / first_at(*of[name, r["seed"]][kind], losses.min()))
            cells += [_spread(lowest, 3), _spread(ratios, 2)]
        shares = [layer["least_used"] for r in mine for layer in r["routing"]]
        cells += [f"{min(shares):.2f} of even" if shares else "-", f"{rates[name]:,.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (folder / "moe_mamba.md").write_text(text)
    print(text)
    plot(folder / "moe_mamba.png", results, of)


def _choice(s: Setting) -> str:
    return f"top-{s.top_k}{', normalised' if s.normalise else ''}"


def _spread(values: list[float], digits: int) -> str:
    if any(map(math.isnan, values)):
        return f"not reached by {sum(map(math.isnan, values))} of {len(values)}"
    low, mean, high = min(values), sum(values) / len(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def plot(path: Path, results: list[dict], of: dict) -> None:
    """Loss against steps, and, below, how many times the steps Mamba needs to the loss that Mamba has at each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", height_ratios=(2, 1))
    for column, kind in enumerate(("held out", "training")):
        above, below = panels[0, column], panels[1, column]
        for name, colour in MODELS.items():
            for i, result in enumerate(r for r in results if r["model"] == name):
                steps, losses = of[name, result["seed"]][kind]
                label = name if i == 0 else None
                above.plot(steps, losses, color=colour, linewidth=1.2, alpha=0.8, label=label)
                mamba_steps, mamba = of["Mamba", result["seed"]][kind]
                best = np.minimum.accumulate(mamba)
                at = np.flatnonzero(mamba_steps >= 0.1 * mamba_steps[-1])
                at = at[:: max(1, len(at) // 60)]
                ratios = [first_at(mamba_steps, mamba, best[j]) / first_at(steps, losses, best[j]) for j in at]
                below.plot(mamba_steps[at], ratios, color=colour, linewidth=1.2, alpha=0.8)
        lowest = min(losses.min() for curve in of.values() for _, losses in [curve[kind]])
        above.set_ylim(lowest - 0.05, lowest + 1.2)
        above.set(ylabel="bits per byte", title=kind if kind == "held out" else f"{kind}, smoothed")
        below.axhline(1.3, color="#888888", linestyle=":", linewidth=1)
        below.set(xlabel="step of Mamba", ylabel="times fewer steps")
        above.legend(frameon=False)
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def run_all(s: Setting, seeds: list[int], at_once: int, folder: Path) -> list[dict]:
    """Each model of each seed in a process, `at_once` at a time; the results of all."""
    todo = [(name, seed) for seed in seeds for name in MODELS]
    waiting = [job for job in todo if not (folder / f"{job[0]}-{job[1]}.json").exists()]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name, seed = waiting.pop(0)
            words = [sys.executable, __file__, "--one", json.dumps([name, seed, asdict(s), str(folder)])]
            running[name, seed] = subprocess.Popen(words)
        for job, process in list(running.items()):
            if process.poll() is not None:
                if process.returncode:
                    raise SystemExit(f"{job}: failed")
                del running[job]
        time.sleep(0.2)
    return [json.loads((folder / f"{name}-{seed}.json").read_text()) for name, seed in todo]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (("steps", 2500), ("d-model", 256), ("n-layer", 8), ("n-experts", 32), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--normalise", action="store_true")
    for name, default in (("context", 512), ("warmup", 100), ("every", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, seed, fields, folder = json.loads(args.one)
        torch.set_num_threads(1)
        run(name, seed, Setting(**fields), Path(folder))
        return
    if not args.texts or args.folder is None:
        parser.error("give folders of text, and a --folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    texts = tuple(str(Path(text).resolve()) for text in args.texts)
    names = [name for name in Setting.__dataclass_fields__ if name != "texts"]
    setting = Setting(texts=texts, **{name: getattr(args, name) for name in names})
    results = run_all(setting, args.seeds, args.at_once, args.folder)
    report(setting, args.folder, results, {name: speed(name, setting) for name in MODELS})


if __name__ == "__main__":
    main()
