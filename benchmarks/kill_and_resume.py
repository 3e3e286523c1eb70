"""Does a training run that is killed go on to the very same results? Kills many, at random moments, and compares.

    python benchmarks/kill_and_resume.py [--domain genomics] [--kills 20] [--seed 0] [--output FILE]
    python benchmarks/kill_and_resume.py --processes 2 --device cuda [--flags="--fsdp"]      one of several processes

Trains the tiny DNA model on random sequences of two classes, or the tiny byte model on random words, a checkpoint every
3 steps, once undisturbed. Then, for each kill anew: the run is killed (SIGKILL, which no program can catch) a random
while after it has reached a random checkpoint, the first moments and the final test included, and continued with
--resume until it ends. Model, metrics and predictions (or the division) have to be those of the undisturbed run, byte
for byte, and so has the logged curve of losses and validation figures, short of the seconds in it. Of several processes
that torchrun started a random one is killed; how long the others live on, and what is said, is told. Exits with 1 if
any result is not the same. Recorded in benchmarks/results/kill_and_resume.md and scaling.md.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

RESULTS = {
    "genomics": ("model.safetensors", "metrics.json", "predictions.tsv"),
    "bytes": ("model.safetensors", "metrics.json", "splits.tsv"),
}


def write_texts(folder: Path, rng: random.Random) -> list[str]:
    """A folder with files of random words."""
    (folder / "texts").mkdir()
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(50)]
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=100)))
    return [str(folder / "texts"), "--context", "64"]


def write_classes(folder: Path, rng: random.Random) -> list[str]:
    """Two FASTA files of random DNA, one of which holds a motif; the flags that name them."""
    flags = []
    for name, motif in (("with", "GGGTACCCGG"), ("without", "")):
        sequences = ["".join(rng.choices("ACGT", k=30)) + motif + "".join(rng.choices("ACGT", k=30)) for _ in range(60)]
        path = folder / f"{name}.fa"
        path.write_text("".join(f">{name}{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
        flags += ["--class", f"{name}={path}"]
    return flags


WRITE = {"genomics": write_classes, "bytes": write_texts}


def command(domain: str, inputs: list[str], output: Path, n: int, device: str, flags: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    train = [sys.executable, *launcher, "-m", "polymamba", domain, "train", *inputs, "-o", str(output)]
    common = ["--epochs", "6", "--batch-size", "16", "--save-every", "3", "--accumulation", str(n), "--device", device]
    return [*train, *common, *flags]


def last_checkpoint(output: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none, -1 if there is no run folder yet."""
    steps = [int(path.name.removeprefix("step-").rstrip("+")) for path in output.glob("checkpoints/step-*")]
    return max(steps, default=0 if output.exists() else -1)


def whole_run(words: list[str]) -> float:
    """Run undisturbed. Returns the seconds that it takes."""
    began = time.monotonic()
    subprocess.run(words, check=True, capture_output=True)
    return time.monotonic() - began


def kill(step: int, delay: float, words: list[str], output: Path, rank: int | None) -> str | None:
    """Start a run, kill it `delay` seconds after its checkpoint of `step`; None if it has ended before that.

    rank: of the process to kill, where torchrun starts several. Returns what there is to tell of the others.
    """
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while last_checkpoint(output) < step and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    if process.poll() is not None:
        return None
    if rank is None:
        process.kill()
        process.communicate()
        return "" if process.returncode == -signal.SIGKILL else None
    os.kill(process_of(rank, process.pid), signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate()
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    return f"process {rank} of them; all ended {time.monotonic() - began:.1f} s later: {' / '.join(lines) or 'no line'}"


def process_of(rank: int, launcher: int) -> int:
    """The id of a process that torchrun has started (Linux)."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(c) for c in children if f"RANK={rank}" in Path(f"/proc/{c}/environ").read_text().split("\0"))


def resume(words: list[str], output: Path) -> None:
    """Go on to the end. A run that was killed before its manifest was whole has not begun: it begins."""
    words = [*words, "--resume"] if (output / "manifest.json").exists() else words
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")


def unlike(one: Path, other: Path, names: tuple[str, ...]) -> list[str]:
    """The results that differ."""
    differing = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    return differing + ["log.jsonl"] * (curve(one) != curve(other))


def curve(run: Path) -> list[dict[str, float]]:
    """What was logged at each step, but how long it took."""
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def report(domain: str, n_kills: int, seed: int, n: int, device: str, flags: list[str]) -> tuple[str, bool]:
    """The lines, printed as they come, and whether every run ended as it should."""
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    rng = random.Random(seed)
    for line in describe():
        say(line)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = WRITE[domain](folder, rng)
        whole = folder / "whole"
        settings = n, device, flags
        seconds = whole_run(command(domain, inputs, whole, *settings))
        last = last_checkpoint(whole)
        how = f"{n} processes on {device}, {' '.join(flags)}".rstrip(", ")
        say(f"{domain}, {how}; undisturbed run: {seconds:.1f} s, {last} steps")
        same = 0
        for number in range(1, n_kills + 1):
            output = folder / f"run{number}"
            step, delay = rng.randrange(0, last + 1, 3), rng.uniform(0, 0.5)
            words = command(domain, inputs, output, *settings)
            rank = rng.randrange(n) if n > 1 else None
            while (others := kill(step, delay, words, output, rank)) is None:
                shutil.rmtree(output)
                delay /= 2
            where = f"killed {delay:.3f} s after step {step}, had a checkpoint of step {last_checkpoint(output)}"
            if others:
                say(f"     {others}")
            resume(words, output)
            differing = unlike(whole, output, RESULTS[domain])
            shutil.rmtree(output)
            same += not differing
            say(f"{number:>3}  {where:<62}  {', '.join(differing) or 'same results'}")
    say(f"{same} of {n_kills} resumed to the same weights, figures and curve")
    return "\n".join(lines) + "\n", same == n_kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=tuple(WRITE), default="genomics")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flags", type=str.split, default=[], help="more flags of the training")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text, all_same = report(args.domain, args.kills, args.seed, args.processes, args.device, args.flags)
    if args.output:
        args.output.write_text(text)
    sys.exit(not all_same)
