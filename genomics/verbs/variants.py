"""`polymamba genomics variants` and `mutagenesis`: what does a language model say of changes?"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pysam

from ...core.device import autocast
from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder, require_writable, save_tsv, write_json, written_whole
from ...core.language_model import LanguageModel
from ...core.terminal import progress_bar, say
from ..alphabet import A, N, T, decode
from ..binned_track import BinnedTracks
from ..labels import Labels, measure
from ..language_commands import Mutagenesis, Variants
from ..plots import plot_mutagenesis
from ..reading.chromosomes import match_names
from ..reading.files import files_of
from ..reading.genome import Genome
from ..reading.source import opened
from ..reading.vcf import VariantFile, header_with, index_if_sorted
from ..tokenizers import CHARACTERS
from ..variant_effects import Site, flank, llrs
from ..variants import Asker, Scored, header_lines, info_entries, score_variants
from .language import load_reader

_REGION = re.compile(r"(.+):([0-9][0-9,]*)-([0-9][0-9,]*)")
AT_A_TIME = 1024  # places of a region


def variants(args: Variants) -> None:
    """Every record of the file, with what the model says of its alleles."""
    packed = args.output is not None and args.output.name.endswith(".vcf.gz")
    if args.output is not None and not packed and args.output.suffix != ".vcf":
        raise InputError(f"{args.output}: name it .vcf or .vcf.gz, which says what is written")
    for path in (args.output, args.metrics):
        if path is not None:
            require_writable(path)
    model = _model_of_bases(args)
    window = args.window or model.config.window
    with ExitStack() as stack:
        source = stack.enter_context(opened(args.vcf))
        file = VariantFile(source)
        if taken := {f"{args.tag}_LLR", f"{args.tag}_WHY"} & file.declared:
            raise InputError(f"{source.name}: has {' and '.join(sorted(taken))} already; give another --tag")
        labels = None
        if args.labels or args.label_field:
            is_flag = args.label_field is not None and file.is_flag(args.label_field)
            labels = Labels(args.label_field, args.labels, args.positive, is_flag=is_flag)
        tally = _Tally(labels)
        genome = stack.enter_context(Genome(files_of(args.genome)))
        write = stack.enter_context(_written(args.output, packed))
        stack.enter_context(autocast(args.compute))
        strands = "over both strands" if args.both_strands else "over the forward strand"
        what = f"by {args.run} in {window} bases, {strands}"
        for line in header_with(file.header, header_lines(args.tag, what)):
            write(line)
        of_sites = partial(_of_sites, model, window, args)
        for scored in score_variants(iter(file), Asker(genome, window, args.max_n), of_sites):
            write(scored.variant.with_info(info_entries(args.tag, scored)))
            tally.add(scored)
    say(tally.describe())
    if labels is not None:
        truth, values, n_without = tally.labelled()
        metrics = measure(truth, values, args.compute.seed)
        say(f"{len(truth)} labelled alleles, {metrics['n_positive']} positive; {n_without} others have no label or LLR")
        for name in ("auroc", "auprc"):
            figure = metrics[name]
            say(f"{name.upper()} of -LLR: {figure['value']:.4f}   ({figure['low']:.4f} to {figure['high']:.4f})")
        if args.metrics is not None:
            write_json(args.metrics, metrics)


def _model_of_bases(args: Variants | Mutagenesis) -> LanguageModel:
    reader = load_reader(args.run, args.compute)
    if reader.tokenizer is not CHARACTERS:
        tokens = "reads tokens of several bases; variants are scored by models of --tokenizer char"
        raise InputError(f"{args.run}: {tokens}")
    return reader.model


def _of_sites(
    model: LanguageModel, window: int, args: Variants | Mutagenesis, sites: list[Site]
) -> Sequence[np.ndarray]:
    return llrs(model, sites, model.config.objective, window, args.max_tokens, both_strands=args.both_strands)


@contextmanager
def _written(output: Path | None, packed: bool) -> Iterator[Callable[[str], object]]:
    """What writes a line: to standard output, or to a file that is whole or not there; of .vcf.gz with its index."""
    if output is None:
        yield lambda line: sys.stdout.write(line + "\n")
        return
    with written_whole(output) as beside:
        if packed:
            with pysam.BGZFile(str(beside), "wb", None) as file:
                yield lambda line: file.write(line.encode() + b"\n")
            if not index_if_sorted(output, beside):
                say(f"{output}: no index, as its records are not sorted by place")
        else:
            with beside.open("w", encoding="utf-8", newline="") as file:
                yield lambda line: file.write(line + "\n")


class _Tally:
    """Counts what became of records; keeps the LLRs of labelled alleles."""

    def __init__(self, labels: Labels | None):
        self.labels = labels
        self.n_records = self.n_scored = 0
        self.reasons: Counter[str] = Counter()
        self.truth: list[bool] = []
        self.values: list[float] = []
        self.n_alleles = 0

    def add(self, scored: Scored) -> None:
        self.n_records += 1
        self.n_alleles += len(scored.reasons)
        self.n_scored += sum(not reason for reason in scored.reasons)
        self.reasons.update(reason for reason in scored.reasons if reason)
        if self.labels is not None:
            for label, value in zip(self.labels.of(scored.variant), scored.llrs.tolist(), strict=True):
                if label is not None and not np.isnan(value):
                    self.truth.append(label)
                    self.values.append(value)

    def labelled(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Labels and LLRs of the alleles that have both, and how many have not."""
        return np.array(self.truth, dtype=bool), np.array(self.values), self.n_alleles - len(self.truth)

    def describe(self) -> str:
        others = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.most_common())
        scored = f"{self.n_records:,} records, {self.n_scored:,} of {self.n_alleles:,} alleles scored"
        return scored + (f"; not scored: {others}" if others else "")


def mutagenesis(args: Mutagenesis) -> None:
    """LLR of every substitution in a region."""
    require_new_folder(args.output)
    match = _REGION.fullmatch(args.region)
    if match is None:
        raise InputError(f"region {args.region!r}: write it CHROM:START-END, from 1, as in chr22:1,000-1,200")
    start, end = int(match[2].replace(",", "")) - 1, int(match[3].replace(",", ""))
    model = _model_of_bases(args)
    window = args.window or model.config.window
    with Genome(files_of(args.genome)) as genome:
        names = [contig.name for contig in genome.contigs]
        name = match_names({match[1]: f"region {args.region}"}, dict.fromkeys(names))[match[1]]
        contig = names.index(name)
        length = genome.contigs[contig].length
        if not 0 <= start < end <= length:
            raise InputError(f"region {args.region}: not within {name!r}, which has {length} bases")
        n = flank(window)
        first = max(0, start - n)
        tokens, _ = genome.tokens(contig, first, min(length, end + n))
    effects = np.full((end - start, 4), np.nan)
    places = [at for at in range(end - start) if tokens[start - first + at] != N]
    with autocast(args.compute), progress_bar("mutagenesis", len(places), "bases") as advance:
        for k in range(0, len(places), AT_A_TIME):
            chunk = places[k : k + AT_A_TIME]
            sites = [_substitutions(tokens, start - first + at, n) for at in chunk]
            for at, site, found in zip(chunk, sites, _of_sites(model, window, args, sites), strict=True):
                effects[at, [int(allele[0]) - A for allele in site.alleles[1:]]] = found
            advance(len(chunk))
    reference = decode(tokens[start - first : end - first])
    with new_folder(args.output) as folder:
        rows = (
            [name, start + at + 1, reference[at], *("." if np.isnan(x) else f"{x:.6g}" for x in effects[at].tolist())]
            for at in range(end - start)
        )
        save_tsv(folder / "effects.tsv", ["chrom", "pos", "ref", "A", "C", "G", "T"], rows)
        with (folder / "effects.bedgraph").open("w", encoding="utf-8") as file:
            known = np.isfinite(effects).any(1)
            means = np.full(len(effects), np.nan)
            means[known] = np.nanmean(effects[known], axis=1)
            BinnedTracks([file], ["mean LLR of the three substitutions"], 1).write(name, [(start, means[:, None])])
        plot_mutagenesis(folder / "effects.png", effects, reference, start + 1, name)


def _substitutions(tokens: np.ndarray, at: int, n: int) -> Site:
    """The site of a base and the three others that may stand in its place."""
    others = [base for base in range(A, T + 1) if base != tokens[at]]
    alleles = [np.array([base], dtype=np.uint8) for base in (tokens[at], *others)]
    return Site(tokens[max(0, at - n) : at], tokens[at + 1 : at + 1 + n], alleles)
