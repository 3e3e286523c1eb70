"""Does a training run that is killed go on to the very same results? Kills many, at random moments, and compares.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [--output benchmarks/results/kill_and_resume.md]

Trains the tiny DNA model on random sequences of two classes, a checkpoint every 3 steps, once undisturbed. Then, for
each kill anew: the run is killed (SIGKILL, which no program can catch) a random while after it has reached a random
checkpoint, the first moments and the final test included, and continued with --resume until it ends. Model, metrics
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
    return [*train, "--epochs", "6", "--batch-size", "16", "--save-every", "3", "--device", "cpu"]


def last_checkpoint(output: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none, -1 if there is no run folder yet."""
    steps = [int(path.name.removeprefix("step-").rstrip("+")) for path in output.glob("checkpoints/step-*")]
    return max(steps, default=0 if output.exists() else -1)


def whole_run(words: list[str]) -> float:
    """Run undisturbed. Returns the seconds that it takes."""
    began = time.monotonic()
    subprocess.run(words, check=True, capture_output=True)
    return time.monotonic() - began


def kill(step: int, delay: float, words: list[str], output: Path) -> bool:
    """Start a run, kill it `delay` seconds after its checkpoint of `step`; False if it has ended before that."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while last_checkpoint(output) < step and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


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
        seconds = whole_run(command(classes, whole))
        last = last_checkpoint(whole)
        say(f"undisturbed run: {seconds:.1f} s, {last} steps")
        same = 0
        for number in range(1, n_kills + 1):
            output = folder / f"run{number}"
            step, delay = rng.randrange(0, last + 1, 3), rng.uniform(0, 0.5)
            while not kill(step, delay, command(classes, output), output):
                shutil.rmtree(output)
                delay /= 2
            where = f"killed {delay:.3f} s after step {step}, had a checkpoint of step {last_checkpoint(output)}"
            resume(command(classes, output), output)
            differing = unlike(whole, output)
            shutil.rmtree(output)
            same += not differing
            say(f"{number:>3}  {where:<62}  {', '.join(differing) or 'same results'}")
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
