"""Speculative decoding of a byte model against plain decoding: bytes a second, batch 1.

    python benchmarks/speculation.py RUN TEXT [--draft RUN2] [--device cuda] [--output results.md]

Prompts are pieces of TEXT from all over it; each way continues each of them, in turn, and its figure is the median over
the prompts. What is drafted: by lookup (ngram), and, with --draft, by a smaller model. On a GPU weights are in bf16.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from machine import describe

from polymamba.bytes import ByteLM
from polymamba.bytes.config import DOCUMENT
from polymamba.core import SamplingConfig, SpeculationConfig, collect, generate, speculate
from polymamba.core.generation import Step
from polymamba.core.speculation import Tally

N_PROMPTS, PROMPT, NEW = 5, 4000, 200
TEMPERATURES = (0.0, 0.7, 1.0)
LOOKED_UP = ((4, "exact"), (8, "exact"), (16, "exact"), (8, "top3"))
DRAWN = ((2, "exact"), (4, "exact"), (4, "top3"))


def prompts_of(text: bytes) -> list[torch.Tensor]:
    places = [i * (len(text) - PROMPT) // N_PROMPTS for i in range(N_PROMPTS)]
    return [torch.tensor([DOCUMENT, *text[place : place + PROMPT]]) for place in places]


def seconds(start: Callable[[], Iterator[Step]]) -> float:
    steps = start()  # the prompt is read here, alike for all
    begin = time.perf_counter()
    collect(steps)
    return time.perf_counter() - begin


def measure(model: ByteLM, drafter: ByteLM | None, prompts: list[torch.Tensor], temperature: float) -> list[str]:
    config = SamplingConfig(temperature=temperature)
    ways = [("ngram", "ngram", *way) for way in LOOKED_UP]
    if drafter is not None:
        ways += [("model", drafter, *way) for way in DRAWN]
    tallies, ratios, rates = [Tally() for _ in ways], [[] for _ in ways], []
    for seed, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: kernels are compiled then
        plain = seconds(lambda: generate(model, [prompt], NEW, config, seeds=[seed]))  # noqa: B023 - called here
        rates.append(NEW / plain)
        for i, (_, by, length, acceptance) in enumerate(ways):
            tallies[i] = Tally() if seed == 0 else tallies[i]
            settings = SpeculationConfig(draft_length=length, acceptance=acceptance)
            options = {"seeds": [seed], "tally": tallies[i]}
            ratios[i].append(plain / seconds(lambda: speculate(model, by, [prompt], NEW, config, settings, **options)))  # noqa: B023
    rows = [f"| {temperature:g} | none | | | | | {statistics.median(rates[1:]):.0f} | 1 |"]
    for (name, _, length, acceptance), tally, ratio in zip(ways, tallies, ratios, strict=True):
        faster = statistics.median(ratio[1:])
        rows.append(
            f"| {temperature:g} | {name} | {length} | {acceptance} | {tally.acceptance_rate:.2f} | "
            f"{tally.tokens_per_forward:.2f} | {faster * statistics.median(rates[1:]):.0f} | {faster:.2f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    where = args.device, torch.float32 if args.device == "cpu" else torch.bfloat16
    model = ByteLM.from_pretrained(args.run).to(*where)
    drafter = None if args.draft is None else ByteLM.from_pretrained(args.draft).to(*where)
    lines = [
        *describe(),
        "",
        f"{N_PROMPTS} prompts of {PROMPT} bytes of {args.text.parent.name}/{args.text.name}, {NEW} new bytes each",
        "",
        "| temperature | drafts | length | acceptance | kept | bytes/forward | bytes/s | times plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for temperature in TEMPERATURES:
        lines += measure(model, drafter, prompts_of(args.text.read_bytes()), temperature)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
