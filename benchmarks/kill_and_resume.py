"""Does a training run that is killed go on to the very same results? Kills many, at random moments, and compares.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [--output benchmarks/results/kill_and_resume.md]

Trains the tiny DNA model on random sequences of two classes, a checkpoint every 3 steps, once undisturbed. Then, for
each kill anew: the run is killed (SIGKILL, which no program can catch) at a moment drawn between the making of its
folder and the time that the undisturbed one took from there, and continued with --resume until it ends. Model, metrics
and predictions have to be those of the undisturbed run, byte for byte. Exits with 1 if any of them is not.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

RESULTS = ("model.safetensors", "metrics.json", "predictions.tsv")


def write_classes(folder: Path, rng: random.Random) -> list[str]:
    """Two FASTA files of random DNA, one of which holds a motif; the flags that name them."""
    flags = []
    for name, motif in (("with", "GGGTACCCGG"), ("without", "")):
        sequences = ["".join(rng.choices("ACGT", k=30)) + motif + "".join(rng.choices("ACGT", k=30)) for _ in range(60)]
        path = folder / f"{name}.fa"
        path.write_text("".join(f">{name}{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
        flags += ["--class", f"{name}={path}"]
    return flags


def command(classes: list[str], output: Path) -> list[str]:
    train = [sys.executable, "-m", "polymamba", "genomics", "train", *classes, "-o", str(output)]
    return [*train, "--epochs", "8", "--batch-size", "16", "--save-every", "3", "--device", "cpu"]


def begin(words: list[str], output: Path) -> subprocess.Popen:
    """Start a run, and wait until it has made its folder."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not output.exists() and process.poll() is None:
        time.sleep(0.001)
    return process


def whole_run(words: list[str], output: Path) -> float:
    """Run undisturbed. Returns the seconds from the making of the folder to the end."""
    process = begin(words, output)
    began = time.monotonic()
    if process.wait():
        raise SystemExit(f"failed: {' '.join(words)}")
    return time.monotonic() - began


def kill_after(seconds: float, words: list[str], output: Path) -> str:
    """Start a run, kill it so many seconds after it made its folder; says where it stood."""
    process = begin(words, output)
    time.sleep(seconds)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        return "had ended"
    checkpoints = sorted(path.name for path in output.glob("checkpoints/step-*"))
    return f"killed, had {checkpoints[-1] if checkpoints else 'no checkpoint'}"


def resume(words: list[str], output: Path) -> None:
    """Go on to the end. A run that was killed before its manifest was whole has not begun: it begins."""
    words = [*words, "--resume"] if (output / "manifest.json").exists() else words
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")


def unlike(one: Path, other: Path) -> list[str]:
    """The results that differ."""
    return [name for name in RESULTS if (one / name).read_bytes() != (other / name).read_bytes()]


def report(n_kills: int, seed: int) -> tuple[str, bool]:
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
        classes = write_classes(folder, rng)
        whole = folder / "whole"
        seconds = whole_run(command(classes, whole), whole)
        say(f"undisturbed run: {seconds:.1f} s from the making of its folder")
        same = 0
        for number in range(1, n_kills + 1):
            output, moment = folder / f"run{number}", rng.uniform(0, seconds)
            where = kill_after(moment, command(classes, output), output)
            resume(command(classes, output), output)
            differing = unlike(whole, output)
            shutil.rmtree(output)
            same += not differing
            say(f"{number:>3}  at {moment:5.2f} s  {where:<28}  {', '.join(differing) or 'same results'}")
    say(f"{same} of {n_kills} resumed to the same weights")
    return "\n".join(lines) + "\n", same == n_kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text, all_same = report(args.kills, args.seed)
    if args.output:
        args.output.write_text(text)
    sys.exit(not all_same)
