"""DNA language models: how fast they read, are trained and score; and in how much memory.

    python benchmarks/dna_language.py [tokenizers] [training] [variants] [scoring] [--output FILE.md]

tokenizers   Mb of bases a second to tokens, windows of 1,024 bases, one process
training     bases a second and peak memory of a step of the 7m model (forward, backward, AdamW; bf16 on a GPU), at
             windows of 1,024 bases to 2^20; the longest with gradient checkpointing
variants     5,000 substitutions of one base in a window of 512 by a 19m model, as a command from the shell, imports and
             all, of one strand the median of 3 runs; the first run, into an empty cache, compiles the kernels; in
             bf16 and in float32, and how far the LLRs of the one are from those of the other
scoring      `genomics score` of generated FASTA files of 10 and 100 Mb (`tiny` on a CPU): bases a second and memory;
             and how far the bits of each base of a piece are from those of the piece in one shot

Weights are random unless --run gives a run folder of `genomics pretrain` for variants and scoring.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pysam
import torch
from machine import describe

from polymamba.genomics.alphabet import A, T, decode
from polymamba.genomics.config import LanguagePreset, language_model_config
from polymamba.genomics.evaluation import base_nats
from polymamba.genomics.language_model import DNALanguageModel
from polymamba.genomics.tokenizers import CHARACTERS, BytePairs, KMers, Tokenizer

GPU = torch.cuda.is_available()
REPEATS = 5
PIECE = 1 << 16  # bases of a forward of `score`, if its flags do not say
WORDS = (sys.executable, "-c")
# What a command takes: printed as the last line. (ru_maxrss would be that of the process which started it, if larger.)
MEASURED = """
import json, re, sys
from polymamba.cli import main
assert main(sys.argv[1:]) == 0
import torch
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(json.dumps({"rss": int(peak) * 1024,
                  "gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}))
"""


def random_bases(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(A, T + 1, n, dtype=np.uint8)


def write_fasta(path: Path, bases: np.ndarray, name: str = "chr1") -> None:
    text = decode(bases)
    path.write_text(f">{name}\n" + "\n".join(text[i : i + 60] for i in range(0, len(text), 60)) + "\n")
    pysam.faidx(str(path))


def model_folder(folder: Path, preset: LanguagePreset) -> Path:
    torch.manual_seed(0)
    DNALanguageModel(language_model_config(preset, "next", 512)).save_pretrained(folder / preset)
    return folder / preset


def run(*words: object) -> tuple[float, dict[str, int]]:
    """Wall seconds of a command from the shell, and its memory in bytes."""
    began = time.perf_counter()
    done = subprocess.run([*WORDS, MEASURED, *map(str, words)], check=True, capture_output=True, text=True)
    return time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])


def tokenizers(folder: Path, given: Path | None) -> Iterator[str]:
    yield "| tokenizer | Mb/s | bases a token |\n|---|---|---|"
    bases = random_bases(1 << 22)
    windows = bases.reshape(-1, 1024)
    began = time.perf_counter()
    pairs = BytePairs.learned(windows[:2048], 4096)
    learning = time.perf_counter() - began
    kinds: dict[str, Tokenizer] = {"char": CHARACTERS, **{f"{k}-mers": KMers(k) for k in (3, 6)}, "bpe 4096": pairs}
    for name, tokenizer in kinds.items():
        times, n_tokens = [], 0
        for _ in range(REPEATS):
            began = time.perf_counter()
            n_tokens = sum(len(tokenizer.encode(window)[0]) for window in windows)
            times.append(time.perf_counter() - began)
        yield f"| {name} | {len(bases) / statistics.median(times) / 1e6:.1f} | {len(bases) / n_tokens:.2f} |"
    yield f"\nbpe: learned from 2 Mb of random bases in {learning:.1f} s"


def training(folder: Path, given: Path | None) -> Iterator[str]:
    device = "cuda" if GPU else "cpu"
    yield "| window | windows a step | checkpointing | bases/s | peak GiB |\n|---|---|---|---|---|"
    lengths = ((1 << 10, 128, False), (1 << 17, 1, False), (1 << 20, 1, True)) if GPU else ((1 << 10, 1, False),)
    for length, batch, checkpointing in lengths:
        torch.manual_seed(0)
        model = DNALanguageModel(language_model_config("7m" if GPU else "tiny", "next", length)).to(device).train()
        model.backbone.gradient_checkpointing = checkpointing
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.from_numpy(random_bases(batch * (length + 1)).astype(np.int64)).view(batch, -1).to(device)

        def step(model=model, optimizer=optimizer, tokens=tokens) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=GPU):
                loss = base_nats(model, tokens[:, :-1], tokens[:, 1:]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if GPU:
                torch.cuda.synchronize()

        step()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
        rate = batch * length / statistics.median(times)
        yield f"| {length:,} | {batch} | {'yes' if checkpointing else 'no'} | {rate:,.0f} | {peak:.1f} |"
        del model, optimizer, tokens, step
        if GPU:
            torch.cuda.empty_cache()


def variants(folder: Path, given: Path | None) -> Iterator[str]:
    bases = random_bases(20_000_000)
    write_fasta(folder / "genome.fa", bases)
    n = 5000 if GPU else 100
    places = np.sort(np.random.default_rng(1).choice(len(bases), n, replace=False))
    rows = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    for at in places.tolist():
        reference = int(bases[at]) - A
        rows.append(f"chr1\t{at + 1}\t.\t{'ACGT'[reference]}\t{'ACGT'[(reference + 1) % 4]}\t.\t.\t.")
    (folder / "in.vcf").write_text("\n".join(rows) + "\n")
    model = given or model_folder(folder, "19m" if GPU else "tiny")
    yield f"{n:,} substitutions, window 512, {model.name}\n"
    pysam.set_verbosity(0)  # of a header that declares no contigs
    words = ["genomics", "variants", model, folder / "in.vcf", "--genome", folder / "genome.fa", "--window", 512]
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder / "triton"), XDG_CACHE_HOME=str(folder / "cache")):
        yield from _timed_variants(folder, words)


def _timed_variants(folder: Path, words: list[object]) -> Iterator[str]:
    yield f"the run that compiles: {run(*words, '-o', folder / 'first.vcf')[0]:.1f} s\n"
    yield "| precision | strands | seconds |\n|---|---|---|"
    llrs = {}
    for precision, strands in (("bf16", "one"), ("bf16", "both"), ("fp32", "both")) if GPU else (("fp32", "both"),):
        out = folder / f"{precision}-{strands}.vcf"
        flag = "--both-strands" if strands == "both" else "--no-both-strands"
        repeats = 3 if strands == "one" or not GPU else 1
        times = [run(*words, flag, "--precision", precision, "-o", out)[0] for _ in range(repeats)]
        yield f"| {precision} | {strands} | {statistics.median(times):.1f} |"
        with pysam.VariantFile(str(out)) as file:
            llrs[precision, strands] = np.array([record.info["PM_LLR"][0] for record in file])
    if GPU:
        one, other = llrs["bf16", "both"], llrs["fp32", "both"]
        difference = np.sqrt(np.mean((one - other) ** 2))
        correlation = np.corrcoef(one, other)[0, 1]
        yield (
            f"\nLLR in bf16 against float32: r = {correlation:.4f}, root mean square difference {difference:.3f} "
            f"beside a standard deviation of {other.std():.3f}"
        )


def scoring(folder: Path, given: Path | None) -> Iterator[str]:
    model = given or model_folder(folder, "7m" if GPU else "tiny")
    yield f"{model.name}\n"
    yield "| Mb | seconds | bases/s | resident GiB | GPU GiB |\n|---|---|---|---|---|"
    for n in (10, 100):
        write_fasta(folder / "long.fa", random_bases(n * 1_000_000))
        seconds, memory = run("genomics", "score", model, folder / "long.fa", "-o", folder / "scores.tsv")
        rss, gpu = (memory[key] / 2**30 for key in ("rss", "gpu"))
        yield f"| {n} | {seconds:.1f} | {n * 1e6 / seconds:,.0f} | {rss:.2f} | {gpu:.2f} |"
    n = 1_000_000 if GPU else 200_000
    write_fasta(folder / "piece.fa", random_bases(n))
    for precision in ("bf16", "fp32") if GPU else ("fp32",):
        bits = []
        for chunk in (PIECE, n):
            track = folder / f"{chunk}.bedgraph"
            run(
                "genomics",
                "score",
                model,
                folder / "piece.fa",
                "--track",
                track,
                "--chunk",
                chunk,
                "--precision",
                precision,
            )
            bits.append(np.loadtxt(track, skiprows=1, usecols=3))
        difference, mean = np.abs(bits[0] - bits[1]), bits[1].mean()
        yield (
            f"\n{n:,} bases in {precision}, carried over pieces of {PIECE:,} against one shot: a base's bits differ by "
            f"{difference.mean():.1e} in the mean and {difference.max():.4f} at most, bits per base "
            f"({mean:.5f}) by {abs(bits[0].mean() - mean):.1e}"
        )


PARTS = {"tokenizers": tokenizers, "training": training, "variants": variants, "scoring": scoring}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--run", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = ["# DNA language models", "", *describe()]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            lines += ["", f"## {part}", ""]
            print(f"\n## {part}\n", flush=True)
            for line in PARTS[part](Path(folder), args.run):
                lines.append(line)
                print(line, flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
