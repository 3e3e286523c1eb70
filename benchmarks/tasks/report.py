"""Tables and pictures of the synthetic tasks, from the JSON files that run.py left.

    python benchmarks/tasks/report.py FOLDER [--out docs]

Writes OUT/results.md and a picture a task beside it. What the papers report stands in PAPERS below; all else is read.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COLOURS = {"mamba": "#4878a8", "attention": "#d1603d", "hybrid": "#3d8f5f", "s4d": "#8a63a6", "lru": "#a67c2e"}
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Section:
    title: str
    axis: str
    metric: str  # accuracy: of answers; whole: of sequences all of whose answers are right
    said: str  # what is measured, in a sentence
    papers: tuple[str, ...]  # what the papers report, a line each
    learnt: str = ""  # the setting that is the longest of training
    log: bool = True


PAPERS = {
    "selective-copying": Section(
        "Selective copying",
        "length",
        "accuracy",
        "16 tokens of 14 kinds among noise, to be repeated in order at the end; share of tokens that are right. Random "
        "answers: 7.1 %. One model is trained at rising lengths (a curriculum, which the paper has not), for most of "
        "the time at the last, and tested at all of them.",
        (
            "Mamba (2312.00752, table 1), length 4096, 400,000 steps: Mamba 99.8, H3 with S6 99.7, S6 without gate "
            "97.0, Mamba's block with S4 56.4, H3 with S4 57.0, S4 without gate 18.3, Hyena 28.4 to 30.1",
        ),
        "length",
    ),
    "induction-heads": Section(
        "Induction heads",
        "length",
        "accuracy",
        "Random tokens with one trigger among them, and again at the end: what followed it? Random answers: 6.7 %. "
        "Recurrent models read long sequences in pieces, the state alone going on. Training begins at 16 tokens and "
        "doubles the length (a curriculum, which the paper has not) to 256, where it stays.",
        (
            "Mamba (2312.00752, tables 2 and 11), trained at 256, 204,800 steps of 8: Mamba (74K parameters) 100 at "
            "all lengths from 64 to 1,048,576; attention with RoPE 83.6 at 512 and 31.3 at 1,024, with xPos 99.6 and "
            "67.6; H3 80.9 at 512; Hyena 100 at 512 and 44.1 at 1,024",
            "Another setting of the task (seq_icl, berlino), chance 5: LRU 4.8, S4D 8.8",
        ),
        "length",
    ),
    "associative-recall": Section(
        "Multi-query associative recall",
        "pairs",
        "accuracy",
        "Key and value pairs, then every key once more among fillers: its value? Share of queries that are right, in "
        "sequences of 4 tokens a pair (64 at least). Training mixes 4 to 64 pairs in up to 256 tokens: few of them "
        "first (a curriculum; the attention and the hybrids of 2026-11-27 did without, where Mamba learnt nothing in "
        "12,000 steps).",
        (
            "Zoology (2312.04927, figure 2) and Based (2402.18668): attention solves it at every width; what a "
            "recurrent model recalls grows with its state",
        ),
    ),
    "copying": Section(
        "Copying",
        "length",
        "whole",
        "Random letters, to be repeated; share of strings that are right to the last letter.",
        (
            "Repeat After Me (2402.01032), 160M parameters: transformers learn it from 100 times fewer examples and, "
            "with Hard-ALiBi, copy 1,000 letters when trained on 50; Mamba falls to 0 just past the length of training",
        ),
        "longest",
    ),
    "ngram-lookup suffix": Section(
        "Look-up by an n-gram, the key after the string",
        "length",
        "whole",
        "Which 3 letters follow those 3? Share of sequences with all three right.",
        ("Repeat After Me (2402.01032): as copying; transformers far ahead",),
        "longest",
    ),
    "ngram-lookup prefix": Section(
        "Look-up by an n-gram, the key before the string",
        "length",
        "whole",
        "The same, but the key is known before the string is read.",
        ("Repeat After Me (2402.01032): Mamba is perfect, at any length",),
        "longest",
    ),
    "listops": Section(
        "ListOps (Long Range Arena)",
        "longest",
        "accuracy",
        "Nested MIN, MAX, MED and SM of digits, 500 to 2,000 tokens; 96,000 examples, 2,000 others to test. Always "
        "the most frequent answer: 17 %. Causal models, averaged over the sequence; the S4s of the literature "
        "average, too, and see both ways.",
        (
            "S4 (2111.00396, and its repository) 59.6, LRU (2303.06349) 60.2, S4D (2206.11893) 60.2 to 60.5; "
            "transformer (2011.04006) 36.4; others to 64",
        ),
        log=False,
    ),
}


def read(folder: Path) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def section_of(run: dict) -> str:
    key = run["settings"].get("key")
    return run["task"] + (f" {key}" if key else "")


def named(run: dict, among: Iterable[dict]) -> str:
    """The model, with what differs among these runs of it."""
    words, s = [run["settings"]["mixer"]], run["settings"]
    others = [other["settings"] for other in among if other["settings"]["mixer"] == s["mixer"]]
    letters = {"d_model": "d", "n_layer": "layers", "d_state": "N", "lr": "lr", "weight_decay": "decay"}
    words += [f"{letter} {s[name]}" for name, letter in letters.items() if len({o[name] for o in others}) > 1]
    if s["mixer"] in ("attention", "hybrid") and not s["rope"]:
        words.append("NoPE")
    return " ".join(words)


def bound(run: dict) -> float:
    """Letters beyond which a state of so many bits must err on every second string: n log2 26 > bits + 1."""
    return (32 * run["state"] + 1) / math.log2(26)


def mean_of(values: list[float]) -> str:
    text = f"{100 * sum(values) / len(values):.1f}"
    return text if len(values) == 1 else f"{text} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def table(runs: list[dict], metric: str) -> list[str]:
    """A row a model, means of its seeds (and the lowest and highest); a column a test."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(named(run, runs), []).append(run)
    columns = sorted({test["x"] for run in runs for test in run["tests"]})
    lines = [
        f"| | parameters | state | seeds | steps | minutes | {' | '.join(f'{x:,}' for x in columns)} |",
        "|---" * (6 + len(columns)) + "|",
    ]
    for name, group in sorted(groups.items()):
        cells = []
        for x in columns:
            values = [test[metric] for run in group for test in run["tests"] if test["x"] == x]
            cells.append(mean_of(values) if values else "-")
        first = group[0]
        steps = "-".join(f"{n:,}" for n in sorted({min(r["steps"] for r in group), max(r["steps"] for r in group)}))
        minutes = f"{sum(run['minutes'] for run in group) / len(group):.1f}"
        state = f"{first['state']:,}" if first["state"] else "grows"
        lines.append(
            f"| {name} | {first['parameters']:,} | {state} | {len(group)} | {steps} | {minutes} | {' | '.join(cells)} |"
        )
    return lines


def bounds(runs: list[dict]) -> list[str]:
    found = {named(run, runs): run for run in runs if run["state"]}
    if not found:
        return []
    each = "; ".join(
        f"{name} {run['state']:,} numbers, {32 * run['state']:,} bits, {bound(run):,.0f} letters"
        for name, run in sorted(found.items())
    )
    return [
        "The bound (2402.01032, section 2): with a state of b bits, strings of n letters are copied wrongly more often "
        f"than not once n log2 26 > b + 1. At 32 bits a number: {each}.",
        "",
    ]


def table_of_run(run: dict) -> str:
    section = PAPERS[section_of(run)]
    lines = [f"# {section.title}: {run['settings']['mixer']}", "", *run["machine"], "", *table([run], section.metric)]
    return "\n".join([*lines, "", f"`{run['command']}`", ""])


def plot_run(path: Path, run: dict) -> None:
    """The loss and the share of right answers in training, and the tests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, losses, accuracies = zip(*run["curve"], strict=True)
    left.plot(steps, losses, color="#607080", linewidth=1, label="loss")
    left.plot(steps, accuracies, color=COLOURS[run["settings"]["mixer"]], linewidth=1, label="share right")
    left.set(xlabel="step", title=f"training: {run['task']}, {run['settings']['mixer']}")
    left.legend(frameon=False)
    _curves(right, PAPERS[section_of(run)], [run])
    _save(figure, path)


def plot_section(path: Path, name: str, runs: list[dict]) -> None:
    from matplotlib.figure import Figure

    section = PAPERS[name]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if section.log:
        _curves(axes, section, runs)
    else:
        for run in runs:
            steps, _, accuracies = zip(*run["curve"], strict=True)
            colour, label = COLOURS[run["settings"]["mixer"]], named(run, runs)
            axes.plot(steps, [100 * a for a in accuracies], color=colour, linewidth=0.6, alpha=0.6)
            score = 100 * run["tests"][0][section.metric]
            axes.axhline(score, color=colour, linestyle="--", linewidth=1, label=f"{label}: {score:.1f} % in the test")
        axes.set(xlabel="step", ylabel="% right, training", title=section.title)
        axes.legend(frameon=False)
    _save(figure, path)


def _curves(axes, section: Section, runs: list[dict]) -> None:
    of_mixer: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda r: [r["settings"][name] for name in ("d_model", "d_state", "lr")]):
        mixer, name = run["settings"]["mixer"], named(run, runs)
        known = of_mixer.setdefault(mixer, [])
        label = None if name in known else name
        if label:
            known.append(name)
        style = STYLES[known.index(name) % len(STYLES)]
        x, y = zip(*((test["x"], 100 * test[section.metric]) for test in run["tests"]), strict=True)
        axes.plot(x, y, style, color=COLOURS[mixer], marker="o", markersize=3, linewidth=1.3, label=label)
    if section.learnt:
        longest = max(run["settings"][section.learnt] for run in runs)
        axes.axvline(longest, color="#888888", linestyle=":", linewidth=1)
        axes.annotate(" longest in training", (longest, 50), fontsize=8, color="#888888", rotation=90, va="center")
    axes.set(xlabel=section.axis, ylabel="% right", ylim=(-3, 103), title=section.title)
    if section.log:
        axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=8)


def _save(figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def report(folder: Path, out: Path) -> str:
    runs = read(folder)
    if not runs:
        raise SystemExit(f"{folder}: no results of run.py (*.json)")
    lines = [
        "# The papers' synthetic tables",
        "",
        "Made by `python benchmarks/tasks/report.py` from what `benchmarks/tasks/all.py` left: models of "
        "`polymamba.core` alone, sequences made as they are needed, percentages. Several runs shared a GPU, so minutes "
        "are no measure of speed. Papers' figures are quoted, not run again.",
        "",
    ]
    for name, section in PAPERS.items():
        mine = [run for run in runs if section_of(run) == name]
        if not mine:
            continue
        picture = f"{name.replace(' ', '-')}.png"
        plot_section(out / picture, name, mine)
        lines += [f"## {section.title}", "", section.said, "", *table(mine, section.metric), ""]
        lines += [f"- {line}." for line in section.papers] + [""]
        lines += bounds(mine) if name == "copying" else []
        lines += [f"![{section.title.lower()}: share right against {section.axis}]({picture})", ""]
        lines += ["```", *(run["command"] for run in mine), "```", ""]
        lines += [*sorted({" \n".join(run["machine"]) for run in mine}), ""]
    text = "\n".join(lines)
    (out / "results.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(report(args.folder, args.out))


if __name__ == "__main__":
    main()
