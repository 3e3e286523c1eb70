"""`polymamba genomics stats` and `split`: look at the data before a model does."""

import numpy as np

from ...core.files import new_folder, require_new_folder, write_json
from ...core.terminal import say
from ..commands import Split, Stats
from ..dividing import divide
from ..similarity import describe_leakage, leakage
from ..sources import read_source
from ..stats import describe_statistics, plot_statistics, statistics
from .common import write_inputs


def stats(args: Stats) -> None:
    """What is in the sequences, as tables and a picture; what leaks from part to part, if the files give parts."""
    data = read_source(args.source, args.target)
    if args.output is not None:
        require_new_folder(args.output)
    figures = statistics(data)
    tables = describe_statistics(figures, data.names)
    if len(np.unique(data.split)) > 1:
        figures["leakage"] = leakage(data.tokens, data.split)
        tables += f"\n\n{describe_leakage(figures['leakage'], data.names)}"
    if args.output is not None:
        with new_folder(args.output) as folder:
            write_inputs(folder, args, data)
            write_json(folder / "stats.json", figures)
            plot_statistics(folder / "stats.png", data)
    print(tables)


def split(args: Split) -> None:
    """Divide, and report what the parts share."""
    data = divide(read_source(args.source, args.target), args.dividing, args.seed)
    require_new_folder(args.output)
    found = leakage(data.tokens, data.split, threshold=args.dividing.similarity)
    with new_folder(args.output) as folder:
        write_inputs(folder, args, data, args.dividing.splits)
        data.write_splits_tsv(folder / "splits.tsv")
        write_json(folder / "leakage.json", found)
    say(data.describe())
    print(describe_leakage(found, data.names))
