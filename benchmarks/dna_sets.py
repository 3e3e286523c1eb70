"""Labelled DNA sets and genomes: test figures of models beside what counting k-mers makes of the same data.

    python benchmarks/dna_sets.py commands DATA RUNS > sets.sh    # what makes the run folders, as a shell script
    python benchmarks/dna_sets.py table RUNS [--output docs/dna.md] [--called PATH=NAME ...] [--machine TEXT]

The table is of the run folders that are there; below it stand the commands that made them, as their manifests have them
(--called gives the folders in these another name), and beside it the picture of perplexity against context.

DATA holds the folders splice_statlog, arabidopsis_splice200, arabidopsis3, apes and athaliana. In apes is the ape
alignment, unpacked: a file a species and part (train/Hsap.fa, ...), each record a region, named binN. In athaliana is
chromosome 1 of TAIR10.1 (chr1.fa), its parts (parts.bed: train up to 21.5 Mb, valid 21.6 to 24, test from 24.1 on) and
its genes after RefSeq (genes.gff): those that code for proteins (gene), the exons of their mRNAs (exon), and CDS.
"""

import argparse
import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

APES = "{data}/apes/{part}/{species}.fa"
HUMAN = " ".join(APES.replace("{part}", part).replace("{species}", "Hsap") for part in ("train", "valid", "test"))
FOUR = " ".join(APES.replace("{part}", "train").replace("{species}", name) for name in ("Hsap", "Ptro", "Ggor", "Ppyg"))
FINE = "--lr 3e-3 --batch-size 128 --ema 0.995 --mask-rate 0.25 --label-smoothing 0.1 --weight-decay 0.3"
SPECIES = "--heads 0 --rc-augment --rc-average --ema 0.99"
LENGTHS = {"arabidopsis3": (256, 1024, 4096, 16384), "apes": (1024, 8192, 65536)}

# Name of the run folder -> the command that makes it, after `polymamba genomics`. Those that begin with another one's
# model stand after it.
RUNS = {
    "hsap": f"pretrain {HUMAN} --preset 1.4m --length 2048 --rc-augment --batch-size 64 --max-tokens 131072 --epochs 8 "
    "--lr 6e-3 --dropout 0.1 --cuda-graph --workers 2",
    "arab": "pretrain '{data}/arabidopsis3/*/*' --preset 1.4m --length 1024 --rc-augment --batch-size 128 "
    "--max-tokens 131072 --epochs 10 --lr 6e-3 --dropout 0.1 --cuda-graph --workers 2",
    "apes": f"pretrain {FOUR} {HUMAN.split(' ', 1)[1]} --preset 7m --length 131072 --first-length 4096 --batch-size 1 "
    "--max-tokens 131072 --epochs 8 --steps-per-epoch 182 --lr 4e-3 --dropout 0.05 --rc-augment --no-baselines "
    "--cuda-graph --workers 2",
    "context": "perplexity {runs}/apes {data}/apes/test/Hsap.fa",
    "hsap-m": f"pretrain {HUMAN} --preset 470k --objective masked --length 512 --batch-size 256 --max-tokens 131072 "
    "--epochs 5 --lr 6e-3 --rc-augment --no-baselines --workers 2",
    "arab-m": "pretrain '{data}/arabidopsis3/*/*' --preset 470k --objective masked --length 512 --batch-size 256 "
    "--max-tokens 131072 --epochs 8 --lr 6e-3 --rc-augment --no-baselines --workers 2",
    "statlog-official": "train --data {data}/splice_statlog/official",
    "statlog-official-init": "train --data {data}/splice_statlog/official --init {runs}/hsap-m --backbone-lr 1e-3 "
    "--dropout 0.2 --epochs 25",
    "statlog-clustered": "train --data {data}/splice_statlog/clustered",
    "statlog-clustered-init": "train --data {data}/splice_statlog/clustered --init {runs}/hsap-m --backbone-lr 1e-3 "
    "--dropout 0.2 --epochs 25",
    "splice200": "train --data {data}/arabidopsis_splice200 --preset small --epochs 30 " + FINE,
    "splice200-init": "train --data {data}/arabidopsis_splice200 --init {runs}/arab-m --backbone-lr 3e-3 "
    "--dropout 0.2 --epochs 20 " + FINE,
    "arabidopsis3": f"train --data {{data}}/arabidopsis3 --window 1024 {SPECIES} --mask-rate 0.05 --balance loss "
    "--batch-size 128 --max-tokens 131072 --epochs 20",
    "arabidopsis3-init": f"train --data {{data}}/arabidopsis3 --window 1024 {SPECIES} --mask-rate 0.05 --balance loss "
    "--batch-size 128 --max-tokens 131072 --epochs 8 --init {runs}/arab",
    "apes-species": f"train --data {{data}}/apes --window 8192 {SPECIES} --mask-rate 0.05 --batch-size 32 "
    "--max-tokens 262144 --epochs 4",
    # As in the Mamba paper, section E.3.4: the last base's state, windows that double from epoch to epoch.
    "apes-species-init": f"train --data {{data}}/apes --last-base --window 65536 --first-window 2048 {SPECIES} "
    "--mask-rate 0 --batch-size 64 --max-tokens 262144 --epochs 7 --steps-per-epoch 40 --lr 3e-4 --backbone-lr 3e-4 "
    "--init {runs}/apes",
    "genes": "train-bases {data}/athaliana/chr1.fa --labels {data}/athaliana/genes.gff --classes CDS exon gene "
    "--stranded --regions {data}/athaliana/parts.bed --preset small --window 8192 --batch-size 16 --max-tokens 131072 "
    "--epochs 8 --lr 3e-3 --rc-augment --workers 2",
}
for _set, _lengths in LENGTHS.items():
    for _run in ("", "-init"):
        for _length in _lengths:
            _name = _set if _set == "arabidopsis3" else "apes-species"
            RUNS[f"{_name}{_run}-{_length}"] = (
                f"eval {{runs}}/{_name}{_run} --data {{data}}/{_set} --split test --rc-average --window {_length}"
            )


HEAD = """Made by `python benchmarks/dna_sets.py table` from the run folders of the commands below. Test figures with
95 % bootstrap intervals. Baselines are simple models of the same data (LR: logistic regression, the best of two or
three settings on the test part). The species' figure is the mean of the classes' recalls, chance being .333 for
arabidopsis3 and .250 for the apes; one model is measured on windows of every length."""
COUNTING = """Test regions are held out in all species. Counting: k-mers of orders 0 to 11, interpolated after Witten
and Bell, by the same command."""
CONTEXT = """The same bases of the human test part after ever more of those before them, by the model of four apes,
which was trained on windows of up to 2^17 bases."""

GENES = """Of each base of *A. thaliana*'s chromosome 1 from 24.1 Mb on: is it coding (CDS), else of an exon (an UTR),
else of a gene (an intron), and on which strand? By a model of 0.6 million parameters, from scratch."""


class Row(NamedTuple):
    """A set, what simple models make of it, the figure of metrics.json, and the run folder that has it: model, length.

    Beside it stands that of the folder in whose name -init follows the model.
    """

    data: str
    baseline: str
    figure: str
    model: str
    length: str = ""


ROWS = [
    Row("splice_statlog, official", "one-hot LR .957, forest .965", "accuracy", "statlog-official"),
    Row("splice_statlog, clustered", "one-hot LR .965, forest .957", "accuracy", "statlog-clustered"),
    Row("arabidopsis_splice200", "one-hot LR .910, forest .867", "accuracy", "splice200"),
]
_KMERS = {"arabidopsis3": (".353", ".375", ".438", ".528"), "apes": (".257", ".278", ".320")}
for _set, _name, _model in (("arabidopsis3",) * 3, ("apes", "great_apes_chr22", "apes-species")):
    for _length, _best in zip(LENGTHS[_set], _KMERS[_set], strict=True):
        ROWS.append(Row(f"{_name}, {_length:,} bases", f"k-mer LR {_best}", "balanced_accuracy", _model, f"-{_length}"))


def commands(data: str, runs: str) -> str:
    lines = [
        f"polymamba genomics {words.format(data=data, runs=runs)} -o {shlex.quote(f'{runs}/{name}')}"
        for name, words in RUNS.items()
    ]
    return "\n".join(["set -e", *lines])


def figure(runs: Path, name: str, key: str) -> str:
    """A figure with its interval; - without the run."""
    path = runs / name / "metrics.json"
    if not path.is_file():
        return "-"
    metrics = json.loads(path.read_text())
    value, low, high = (metrics[key][part] for part in ("value", "low", "high"))
    return f"{value:.4f} ({low:.4f} to {high:.4f})".replace("0.", ".")


def trained(runs: Path, name: str) -> dict[str, Any]:
    path = runs / name / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def language_models(runs: Path) -> list[str]:
    lines = ["| genome | best of counting | model | bits per base |", "|---|---|---|---|"]
    genomes = {"hsap": "human chr22", "arab": "arabidopsis3", "apes": "human chr22, learned from four apes"}
    genomes |= {"hsap-m": "human chr22, hidden bases from both sides", "arab-m": "arabidopsis3, likewise"}
    for name, genome in genomes.items():
        metrics = trained(runs, name)
        if not metrics:
            continue
        counted = metrics if "order_bits_per_base" in metrics else trained(runs, "hsap") if name == "apes" else {}
        orders = counted.get("order_bits_per_base", [])
        best = f"order {orders.index(min(orders))}: {min(orders):.3f}" if orders else "-"
        words = shlex.split(RUNS[name])
        lines.append(
            f"| {genome} | {best} | {words[words.index('--preset') + 1]} | **{metrics['bits_per_base']:.4f}** |"
        )
    return lines


def context(runs: Path) -> list[str]:
    path = runs / "context" / "perplexity.tsv"
    if not path.is_file():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    lines = ["| bases of context | bits per base | perplexity | change in bits, 95 % interval |", "|---|---|---|---|"]
    for row in rows:
        bits, perplexity, *change = (f"{float(row[key]):.4f}" for key in list(row)[1:6])
        interval = f"{change[0]} ({change[1]} to {change[2]})"
        lines.append(f"| {int(row['context']):,} | {bits} | {perplexity} | {interval} |")
    return lines


def tables(runs: Path) -> list[str]:
    lines = ["| data | baseline on test | figure | from scratch | begun with `pretrain` |", "|---|---|---|---|---|"]
    for row in ROWS:
        cells = [figure(runs, f"{row.model}{begun}{row.length}", row.figure) for begun in ("", "-init")]
        lines.append(f"| {row.data} | {row.baseline} | {row.figure.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def bases(runs: Path) -> list[str]:
    metrics = trained(runs, "genes")
    if not metrics:
        return []
    figures = [f"{key.replace('_', ' ')} {figure(runs, 'genes', key)}" for key in ("accuracy", "mcc", "macro_f1")]
    keys = ("precision", "recall", "f1", "auroc", "auprc")
    lines = [f"{', '.join(figures)}.", "", f"| a base is | share | {' | '.join(keys)} |", "|---" * 7 + "|"]
    for name, row in metrics["per_class"].items():
        cells = ["-" if row[key] is None else f"{row[key]:.3f}".removeprefix("0") for key in keys]
        lines.append(f"| {name} | {row['support'] / metrics['bases']:.3f} | {' | '.join(cells)} |")
    return lines


def made_by(runs: Path, called: list[str]) -> list[str]:
    """The commands that made the run folders, of those in RUNS that are there."""
    lines = []
    for name in RUNS:
        path = runs / name / "manifest.json"
        if path.is_file():
            words = shlex.join(["polymamba", *json.loads(path.read_text())["command"][1:]])
            for pair in called:
                words = words.replace(*pair.split("=", 1))
            stopped = "train" in words.split()[2] and not (runs / name / "metrics.json").is_file()
            lines.append(words + "  # stopped early: its best epoch's model" * stopped)
    return lines


def page(args: argparse.Namespace) -> str:
    runs = args.runs
    manifests = sorted(runs.glob("*/manifest.json"))
    newest = json.loads(manifests[-1].read_text()) if manifests else {"started": "", "versions": {}}
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items() if name[:1] == "t")
    lines = [
        "# DNA: labelled sets and genomes",
        "",
        HEAD,
        "",
        *tables(runs),
        "",
        "## Next base, bits per base",
        "",
        COUNTING,
        "",
        *language_models(runs),
    ]
    if found := context(runs):
        lines += ["", "## More context", "", CONTEXT, "", *found]
        if args.output and (picture := runs / "context" / "perplexity.png").is_file():
            shutil.copy(picture, args.output.with_name(f"{args.output.stem}-context.png"))
            lines += ["", f"![bits per base against context]({args.output.stem}-context.png)"]
    if found := bases(runs):
        lines += ["", "## Each base", "", GENES, "", *found]
    lines += ["", "## Commands", "", "```", *made_by(runs, args.called), "```"]
    lines += ["", f"date: {newest['started'][:10]}   {args.machine}; {versions}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    of_commands = verbs.add_parser("commands")
    of_commands.add_argument("data")
    of_commands.add_argument("runs")
    of_table = verbs.add_parser("table")
    of_table.add_argument("runs", type=Path)
    of_table.add_argument("--output", type=Path)
    of_table.add_argument("--called", action="append", default=[], metavar="PATH=NAME")
    of_table.add_argument("--machine", default="")
    args = parser.parse_args()
    if args.verb == "commands":
        print(commands(args.data, args.runs))
    else:
        print(text := page(args))
        if args.output:
            args.output.write_text(text)
