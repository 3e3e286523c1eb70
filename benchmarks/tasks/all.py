"""All runs of the synthetic tasks, side by side on the GPUs there are, then the report.

    python benchmarks/tasks/all.py --folder runs/tasks [--minutes 6.5] [--gpus 4] [--out docs]

What is done already is not done again, and what was killed goes on: the same command continues.
"""

import argparse
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent

# (share of a GPU that a run is thought to need, its command)
RUNS = (
    (5, "selective-copying --mixer mamba --batch 32 --lr 3e-3 --bf16"),
    (2, "selective-copying --mixer s4d --batch 32 --lr 3e-3"),
    (2, "induction-heads --mixer mamba --batch 32 --lr 3e-3"),
    (2, "induction-heads --mixer mamba --batch 64 --lr 1e-2 --seed 5"),
    (2, "induction-heads --mixer mamba --batch 64 --lr 1e-2 --seed 6"),
    (1, "induction-heads --mixer attention --batch 64 --lr 1e-3 --longest 16384"),
    (1, "induction-heads --mixer s4d --batch 64 --longest 16384"),
    (1, "induction-heads --mixer lru --batch 64 --longest 16384"),
    (2, "associative-recall --mixer mamba --d-model 64 --batch 128 --lr 3e-3"),
    (2, "associative-recall --mixer mamba --d-model 128 --batch 128 --lr 2e-3"),
    (2, "associative-recall --mixer attention --d-model 64 --batch 128 --lr 1e-3"),
    (2, "associative-recall --mixer attention --d-model 128 --batch 128 --lr 1e-3"),
    (2, "associative-recall --mixer hybrid --d-model 64 --batch 128"),
    (2, "associative-recall --mixer hybrid --d-model 128 --batch 128"),
    (2, "copying --mixer mamba --d-state 4 --batch 128 --lr 3e-3"),
    (2, "copying --mixer mamba --d-state 16 --batch 128 --lr 3e-3"),
    (2, "copying --mixer attention --n-layer 4 --batch 128 --lr 1e-3"),
    (2, "copying --mixer attention --n-layer 4 --batch 128 --lr 1e-3 --rope"),
    (2, "copying --mixer hybrid --batch 128"),
    (1, "ngram-lookup --key suffix --mixer mamba --batch 128 --lr 3e-3"),
    (1, "ngram-lookup --key prefix --mixer mamba --batch 128 --lr 3e-3"),
    (1, "ngram-lookup --key suffix --mixer hybrid --batch 128"),
    (1, "ngram-lookup --key suffix --mixer attention --n-layer 4 --batch 128 --lr 1e-3"),
    (6, "listops --mixer mamba --bf16"),
    (6, "listops --mixer s4d --lr 5e-3"),
)


def shared_out(n_gpus: int) -> list[list[str]]:
    """The runs of each GPU: the largest first, each to where least is."""
    load, runs = [0] * n_gpus, [[] for _ in range(n_gpus)]
    for need, run in sorted(RUNS, key=lambda r: -r[0]):
        gpu = load.index(min(load))
        load[gpu] += need
        runs[gpu].append(run)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--minutes", type=float, default=6.5, help="of training, of each run")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    began, running = time.monotonic(), {}
    for gpu, runs in enumerate(shared_out(args.gpus)):
        for run in runs:
            words = [sys.executable, str(HERE / "run.py"), *run.split()]
            words += ["--minutes", str(args.minutes), "--folder", str(args.folder)]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "1"}
            log = (args.folder / f"{'_'.join(run.replace('--', '').split())}.log").open("a")
            start = partial(subprocess.Popen, env=environment, stdout=log, stderr=subprocess.STDOUT)
            running[run] = start, words, start(words)
    failed = []
    while running:
        for run, (start, words, process) in list(running.items()):
            if process.poll() is None:
                continue
            said = f"failed ({process.returncode})" if process.returncode else "done"
            if process.returncode and "--no-graph" not in words:
                words = [*words, "--no-graph"]
                running[run] = start, words, start(words)
                said += ", again without a CUDA graph"
            else:
                del running[run]
                failed += [run] if process.returncode else []
            print(f"{time.monotonic() - began:.0f} s: {run}: {said}", flush=True)
        time.sleep(0.5)
    subprocess.run([sys.executable, str(HERE / "report.py"), str(args.folder), "--out", str(args.out)], check=True)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: see their logs in {args.folder}")


if __name__ == "__main__":
    main()
