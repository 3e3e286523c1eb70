"""Language models on a GPU: generation with and without a CUDA graph, a Transformer of equal size, a training step.

    python benchmarks/gpu_model.py [--only generation|transformer|training] [--output benchmarks/results/gpu_model.md]

bf16, untrained weights, greedy, prompts of random tokens. A generation counts from the prompts to the last token, as
the official benchmark_generation_mamba_simple.py does; medians of 3 after one that captures the graph. "step": the time
of one more token, from two lengths. Limit of a step: weights read once, states read and written, at the copy bandwidth
of the same run. The training step (forward, cross-entropy, backward, no optimizer) is under autocast, medians of 9.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import describe
from scan import copy_bandwidth
from torch.utils import _pytree as pytree

import polymamba.core.generation as generation
from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig
from polymamba.core.config import SamplingConfig
from polymamba.core.replayed import Replayed, own_stream
from polymamba.core.speed import median_seconds, with_peak

GREEDY = SamplingConfig(temperature=0)
SHAPES = {  # name: backbone, vocabulary, batches
    "130M": (BackboneConfig(d_model=768, n_layer=24), 50288, (1, 64, 256)),
    "1.4B": (BackboneConfig(d_model=2048, n_layer=48), 50288, (1, 64, 256)),
    "MambaByte-972M": (BackboneConfig(d_model=1792, n_layer=48, norm="layer"), 320, (1, 64)),
}
TRANSFORMER = BackboneConfig(d_model=2048, n_layer=48, pattern=("attention", "mlp"))  # as large as "1.4B"


def build(backbone: BackboneConfig, vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=vocab_size))
    return model.to(dtype).eval()


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    return median_seconds(work, torch.device("cuda"), repeats)


def prompts_of(model: LanguageModel, batch: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(model.config.vocab_size, (batch, length), generator=generator))


def write_on(model: LanguageModel, prompts: list[torch.Tensor], n_new: int) -> None:
    for _ in generation.generate(model, prompts, n_new, GREEDY):
        pass


def generations(model: LanguageModel, name: str, batch: int, bandwidth: float, prompt: int = 128, n_new: int = 256):
    prompts = prompts_of(model, batch, prompt)
    whole = seconds(lambda: write_on(model, prompts, n_new))
    step = (whole - seconds(lambda: write_on(model, prompts, n_new // 2))) / (n_new - n_new // 2)
    graphed, generation.GRAPHED = generation.GRAPHED, 10**9
    plain = seconds(lambda: write_on(model, prompts, n_new), 1)
    generation.GRAPHED = graphed
    moved = sum(p.nbytes for p in model.parameters()) + 2 * sum(
        s.nbytes for s in pytree.tree_leaves(model.init_state(batch))
    )
    limit = moved / bandwidth
    return (
        f"| {name} | {batch} | {prompt} + {n_new} | {batch * n_new / whole:,.0f} | {batch * n_new / plain:,.0f} "
        f"| {step * 1e3:.3f} | {limit * 1e3:.3f} | {limit / step:.0%} |"
    )


def report_generation(bandwidth: float) -> list[str]:
    lines = [
        "| model | batch | prompt + new | tokens/s | without a graph | step ms | limit | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (backbone, vocab_size, batches) in SHAPES.items():
        model = build(backbone, vocab_size)
        lines += [generations(model, name, batch, bandwidth) for batch in batches]
        print(*lines[-len(batches) :], sep="\n", flush=True)
    return [*lines, ""]


def report_transformer(bandwidth: float) -> list[str]:
    lines = ["| prompt 2048 + 128 | parameters | batch | tokens/s | seconds |", "|---|---|---|---|---|"]
    for name, backbone in (("Mamba", SHAPES["1.4B"][0]), ("Transformer", TRANSFORMER)):
        model = build(backbone, 50288)
        size = sum(p.numel() for p in model.parameters())
        for batch in (32, 64, 128):
            try:
                prompts = prompts_of(model, batch, 2048)
                taken = seconds(lambda model=model, prompts=prompts: write_on(model, prompts, 128), 2)
                speed = f"{batch * 128 / taken:,.0f} | {taken:.2f}"
            except torch.OutOfMemoryError:
                speed = "out of memory | "
            lines.append(f"| {name} | {size / 1e9:.2f}e9 | {batch} | {speed} |")
            print(lines[-1], flush=True)
            torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()
    return [*lines, ""]


def report_training(bandwidth: float) -> list[str]:
    model = build(*SHAPES["130M"][:2], dtype=torch.float32).train()
    device = torch.device("cuda")
    tokens = torch.randint(50288, (8, 2049), device=device)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()

    lines = ["| training step of 130M, 8 x 2048 | ms | tokens/s | GiB at the peak, weights among them |"]
    lines += ["|---|---|---|---|"]
    replayed = Replayed(lambda _: step(), device)
    for name, work in (("as Python launches it", step), ("recorded (--cuda-graph)", lambda: replayed({}))):
        with own_stream(device):
            taken, peak = with_peak(partial(median_seconds, work, device, 9, 4), device)
        speed = "out of memory | " if taken is None else f"{taken * 1e3:.1f} | {8 * 2048 / taken:,.0f}"
        lines.append(f"| {name} | {speed} | {(peak or 0) / 2**30:.1f} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


REPORTS = {"generation": report_generation, "transformer": report_transformer, "training": report_training}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=REPORTS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    text = ["# Language models on a GPU", "", *describe(), f"copy: {bandwidth / 1e12:.2f} TB/s", ""]
    for name in [args.only] if args.only else REPORTS:
        text += REPORTS[name](bandwidth)
    if args.output:
        args.output.write_text("\n".join(text))
