"""What the verbs that go over genomes share."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...core.errors import InputError
from ...core.processes import from_first
from ...core.terminal import progress_bar, say
from ..n_runs import find_n_runs
from ..parts import Stretch
from ..pretraining import Windows, cut_stretches
from ..reading.genome import Genome


def windows_of_parts(genome: Genome, stretches: Sequence[Stretch], length: int, max_n: float) -> dict[str, Windows]:
    """The windows of each part; how many are mostly N is said. Raises InputError if train or valid has none left."""
    with progress_bar("letters", sum(s.n_bases for s in stretches), "bases") as advance:
        runs = from_first(lambda: find_n_runs(genome, stretches, advance=advance))
    parts, dropped = {}, []
    for part in ("train", "valid", "test"):
        members = [i for i, stretch in enumerate(stretches) if stretch.part == part]
        parts[part] = Windows([stretches[i] for i in members], [runs[i] for i in members], max_n)
        windows, n_dropped = cut_stretches(parts[part], length, None)
        dropped.append(f"{n_dropped:,} of {n_dropped + len(windows):,} {part}")
        if not len(windows) and members:
            raise InputError(f"all {n_dropped} windows of the {part} part are more than {max_n:.0%} N; see --max-n")
    say(f"windows left out, more than {max_n:.0%} of their bases being N: {', '.join(dropped)}")
    return parts


def settings_of_genome(args: Any, genome: Genome, of_training: dict[str, Any]) -> dict[str, Any]:
    """What determines the result of a training verb, beside the files."""
    groups = {"output", "resume", "dividing", "train", "compute", "fasta"}
    given = {name: value for name, value in asdict(args).items() if name not in groups}
    return {
        **given,
        **asdict(args.dividing),
        "regions": [str(path) for path in args.dividing.regions],
        **of_training,
        "contigs": len(genome.contigs),
        "bases": genome.n_bases,
    }


def window_and_overlap(window: int, overlap: int | None) -> tuple[int, int]:
    """Both, the overlap half a window if left out. Raises InputError if they do not fit together."""
    overlap = window // 2 if overlap is None else overlap
    if not 0 <= overlap < window:
        raise InputError(f"--overlap {overlap}: must be at least 0 and less than the window, which is {window}")
    return window, overlap


def require_unlike_names(genome: Genome) -> None:
    """Raises InputError if two records have one name."""
    seen: dict[str, object] = {}
    for contig in genome.contigs:
        if contig.name in seen:
            both = f"{seen[contig.name]} and {contig.path} both hold a record {contig.name!r}"
            raise InputError(f"{both}, which a track could not tell apart; rename one")
        seen[contig.name] = contig.path
