"""Reading FASTA: ours against pysam alone and Biopython's SimpleFastaParser: MB of text a second, by packing.

    python benchmarks/reading.py [--size 200] [--output benchmarks/results/reading.md]

Random ACGT, 60 letters a line, in records of 1 kb and of 5 Mb; plain, gzip and bgzip. MB of decompressed text a second,
medians of five runs in one process, the readers in turn; the files are in the page cache. What each does for it:
    polymamba  checks every byte (damage, foreign content, letters, double names), gives text and token ids
    pysam      FastxFile: gives text; checks nothing
    Biopython  SimpleFastaParser: gives text; checks nothing
FASTQ is read from records of 150 bases, plain, by Biopython's FastqGeneralIterator in place of SimpleFastaParser.

Then four FASTA files to names and tokens, one after another and in two threads: of the fastest of the runs the seconds
and, of two threads, the cores that worked at once (CPU seconds a second). On a machine with other work the latter is
what the threads were given at least; the control, checksums, says what there was to be had.
"""

import argparse
import gzip
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pysam
from Bio.SeqIO.FastaIO import SimpleFastaParser
from Bio.SeqIO.QualityIO import FastqGeneralIterator
from machine import describe

from polymamba.genomics import Record, read_records
from polymamba.genomics.reading.several import read_each

RUNS = 5
LENGTHS = {"1 kb": 1_000, "5 Mb": 5_000_000}
WIDTH = 60


def sequences(length: int, total: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT", np.uint8)
    for _ in range(max(total // length, 1)):
        yield letters[rng.integers(0, 4, length, dtype=np.uint8)].tobytes()


def write_fasta(path: Path, length: int, total: int) -> None:
    with path.open("wb") as file:
        for number, sequence in enumerate(sequences(length, total)):
            lines = [sequence[i : i + WIDTH] for i in range(0, length, WIDTH)]
            file.write(b">r%d sample\n%b\n" % (number, b"\n".join(lines)))


def write_fastq(path: Path, length: int, total: int) -> None:
    with path.open("wb") as file:
        for number, sequence in enumerate(sequences(length, total)):
            file.write(b"@r%d sample\n%b\n+\n%b\n" % (number, sequence, b"I" * length))


def pack(plain: Path, packing: str) -> Path:
    packed = plain.with_suffix(f".{packing}")
    if packing == "gzip":
        packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=6))
    elif packing == "bgzip":
        pysam.tabix_compress(str(plain), str(packed))
    return plain if packing == "plain" else packed


def ours(path: Path) -> None:
    for _ in read_records(path):
        pass


def by_pysam(path: Path) -> None:
    with pysam.FastxFile(str(path), persist=False) as entries:
        for entry in entries:
            _ = entry.name, entry.comment, entry.sequence


def by_biopython(path: Path) -> None:
    with gzip.open(path, "rt") if path.suffix in (".gzip", ".bgzip") else path.open() as text:
        for _ in FastqGeneralIterator(text) if path.suffix == ".fastq" else SimpleFastaParser(text):
            pass


READERS: dict[str, Callable[[Path], None]] = {"polymamba": ours, "pysam": by_pysam, "Biopython": by_biopython}


def speeds(path: Path, n_bytes: int) -> dict[str, float]:
    """Reader -> median MB/s."""
    times: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(RUNS):
        for name, reader in READERS.items():
            began = time.perf_counter()
            reader(path)
            times[name].append(time.perf_counter() - began)
    return {name: n_bytes / 1e6 / statistics.median(values) for name, values in times.items()}


def name_and_tokens(record: Record) -> tuple[str, np.ndarray]:
    return record.name, record.tokens


def checksums(n_threads: int, n_bytes: int = 50_000_000) -> None:
    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(lambda _: hashlib.sha256(bytes(n_bytes)).digest(), range(4)))


def fastest(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and CPU seconds a second, of the fastest of the runs."""
    found = []
    for _ in range(RUNS):
        began, cpu_began = time.perf_counter(), time.process_time()
        run()
        seconds = time.perf_counter() - began
        found.append((seconds, (time.process_time() - cpu_began) / seconds))
    return min(found)


def report_several(total: int, folder: str) -> list[str]:
    lines = ["", f"Four files of about {total / 4e6:.0f} MB each, seconds of the fastest of {RUNS} runs", ""]
    lines += ["| | one after another | two threads | cores at once |", "|---|---|---|---|"]
    runs: dict[str, Callable[[int], object]] = {}
    for name, length in LENGTHS.items():
        plain = [Path(folder, f"{length}-{i}.fasta") for i in range(4)]
        for path in plain:
            write_fasta(path, length, total // 4)
        for packing in ("plain", "gzip"):
            paths = [pack(path, packing) for path in plain]
            runs[f"{name}, {packing}"] = lambda n, paths=paths: list(read_each(paths, name_and_tokens, n_threads=n))
    for what, run in {**runs, "control": checksums}.items():
        (one, _), (two, cores) = (fastest(lambda run=run, n=n: run(n)) for n in (1, 2))
        lines.append(f"| {what} | {one:.2f} | {two:.2f} | {cores:.2f} |")
    return lines


def report(total: int) -> str:
    lines = ["# Reading FASTA and FASTQ", "", *describe()]
    lines += [f"pysam {version('pysam')}, biopython {version('biopython')}", ""]
    lines += [
        f"MB of decompressed text a second, one process, medians of {RUNS}, about {total / 1e6:.0f} MB a file",
        "",
    ]
    lines += [f"| | {' | '.join(READERS)} | ours / pysam | ours / Biopython |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, length in LENGTHS.items():
            plain = Path(folder, f"{length}.fasta")
            write_fasta(plain, length, total)
            files += [
                (f"FASTA, {name}, {packing}", pack(plain, packing), plain) for packing in ("plain", "gzip", "bgzip")
            ]
        fastq = Path(folder, "150.fastq")
        write_fastq(fastq, 150, total // 2)
        for what, path, unpacked in [*files, ("FASTQ, 150 b, plain", fastq, fastq)]:
            found = speeds(path, os.path.getsize(unpacked))
            ratios = [found["polymamba"] / found[peer] for peer in ("pysam", "Biopython")]
            cells = [f"{speed:.0f}" for speed in found.values()] + [f"{ratio:.2f}" for ratio in ratios]
            lines.append(f"| {what} | {' | '.join(cells)} |")
        lines += report_several(total, folder)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=200, help="MB of sequence in each file")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = report(args.size * 1_000_000)
    print(text)
    if args.output:
        args.output.write_text(text)
