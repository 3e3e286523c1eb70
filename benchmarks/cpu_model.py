"""A small Mamba language model on the CPU: ours against transformers and mambapy: time, peak memory, growth by length.

    python benchmarks/cpu_model.py [--threads 2] [--output benchmarks/results/cpu_model.md]

Two Mamba layers of d_model 256, vocabulary 256, float32. All models hold the same shapes; each measurement runs in a
process of its own, so that its peak memory (maximum resident set, less what the process held before the first run) is
its own. Medians; slow ones are repeated less, and one that takes more than 180 s counts as 180 with no memory figure.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for all alike, as polymamba's command line has it

import torch
from machine import describe
from torch import nn

D_MODEL, N_LAYER, VOCAB = 256, 2, 256
PEERS = ("transformers", "mambapy")
LIMIT = 180  # seconds for one measurement


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "polymamba":
        from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig

        backbone = BackboneConfig(d_model=D_MODEL, n_layer=N_LAYER)
        return LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=VOCAB))
    if name == "transformers":
        from transformers import MambaConfig, MambaForCausalLM

        class Logits(nn.Module):
            def __init__(self):
                super().__init__()
                config = MambaConfig(vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=N_LAYER)
                self.model = MambaForCausalLM(config)

            def forward(self, tokens):
                return self.model(tokens, use_cache=False).logits

        return Logits()
    from mambapy.mamba import Mamba, MambaConfig

    blocks = Mamba(MambaConfig(d_model=D_MODEL, n_layers=N_LAYER))
    return nn.Sequential(
        nn.Embedding(VOCAB, D_MODEL), blocks, nn.RMSNorm(D_MODEL), nn.Linear(D_MODEL, VOCAB, bias=False)
    )


def measure(name: str, batch: int, length: int, backward: bool, threads: int) -> dict[str, float]:
    """Median seconds of a forward (and backward) pass and the peak memory in MiB that it adds."""
    torch.set_num_threads(threads)
    model = build(name)
    tokens = torch.randint(VOCAB, (batch, length))
    warm = torch.randint(VOCAB, (1, 64))  # compiles and loads what the first call loads

    def run(tokens: torch.Tensor) -> float:
        began = time.perf_counter()
        if backward:
            model.zero_grad()
            model(tokens).square().mean().backward()
        else:
            with torch.no_grad():
                model(tokens)
        return time.perf_counter() - began

    run(warm)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [run(tokens)]
    while len(times) < 21 and sum(times) < 15:
        times.append(run(tokens))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(times), "runs": len(times), "mib": peak / 1024}


def in_process(name: str, batch: int, length: int, backward: bool, threads: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--one", json.dumps([name, batch, length, backward, threads])]
    try:
        result = subprocess.run(words, check=True, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"seconds": LIMIT, "runs": 0, "mib": float("nan")}  # took longer: its time is at least this
    print(name, batch, length, "fwd+bwd" if backward else "fwd", result.stdout.strip(), file=sys.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def report(threads: int) -> str:
    lines = ["# A small Mamba language model on the CPU", "", *describe(), ""]
    lines += [
        f"{N_LAYER} layers, d_model {D_MODEL}, float32, {threads} threads; medians, seconds (MiB added at the peak)"
    ]
    lines += [
        "",
        "| | polymamba | transformers | mambapy | faster peer / ours | its memory / ours |",
        "|---|---|---|---|---|---|",
    ]
    for batch in (1, 8):
        for backward in (False, True):
            rows = {name: in_process(name, batch, 1024, backward, threads) for name in ("polymamba", *PEERS)}
            ours, peer = rows["polymamba"], min((rows[name] for name in PEERS), key=lambda row: row["seconds"])
            cells = [f"{row['seconds']:.4g} ({row['mib']:.0f})" for row in rows.values()]
            what = f"batch {batch} x 1024, {'forward + backward' if backward else 'forward'}"
            ratios = [f"{peer[key] / max(ours[key], 1e-9):.1f}" for key in ("seconds", "mib")]
            lines.append(f"| {what} | {' | '.join(cells)} | {' | '.join(ratios)} |")
    lines += ["", "Growth with length, polymamba, batch 1:", ""]
    lines += ["| length | forward s | us / token | forward + backward s | us / token |", "|---|---|---|---|---|"]
    for length in (1024, 4096, 16384, 65536):
        rows = [in_process("polymamba", 1, length, backward, threads) for backward in (False, True)]
        cells = [f"{row['seconds']:.4g} | {row['seconds'] / length * 1e6:.1f}" for row in rows]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
    else:
        torch.set_num_threads(args.threads)
        text = report(args.threads)
        print(text)
        if args.output:
            args.output.write_text(text)
