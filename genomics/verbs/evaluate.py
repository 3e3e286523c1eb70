"""`polymamba genomics eval`: how good is a model on labelled sequences?"""

from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder
from ...core.hub import CONFIG, WEIGHTS
from ...core.terminal import progress_bar, say
from ..commands import Eval
from ..sources import read_source
from ..windows import cut_windows, without_n_rich
from .common import load_models, mean_predictions, passes, report, tuned_thresholds, write_inputs


def evaluate(args: Eval) -> None:
    """Measure the model of a run folder, or the mean of several."""
    models = load_models([args.run, *args.ensemble], args.compute)
    config = models[0].config
    thresholds = tuned_thresholds(args, config) if args.tuned_threshold else None
    data = read_source(args.source, config.target, hard_mask=config.hard_mask).with_classes(config.classes)
    if args.split is not None:
        data = data.subset(args.split)
        if not data.names:
            raise InputError(f"--split {args.split}: no record is of this part")
    data, n_dropped = without_n_rich(cut_windows(data, args.window or config.window, None), args.max_n)
    if not data.names:
        raise InputError(f"all {n_dropped} sequences are more than {args.max_n:.0%} N; see --max-n")
    if n_dropped:
        say(f"{n_dropped} left out: more than {args.max_n:.0%} of their bases are N")
    require_new_folder(args.output)
    with progress_bar("eval", sum(map(len, data.tokens)) * passes(args), "bases") as advance:
        predictions = mean_predictions(models, data.tokens, args, advance)
    with new_folder(args.output) as folder:
        weights = [run / name for run in (args.run, *args.ensemble) for name in (CONFIG, WEIGHTS)]
        write_inputs(folder, args, data, *weights)
        report(folder, data, predictions, args.compute.seed, thresholds)
