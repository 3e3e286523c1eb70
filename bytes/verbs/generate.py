"""`polymamba bytes generate`: a model writes on, and what it writes appears at once."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...core.device import autocast
from ...core.errors import InputError
from ...core.generation import FinishReason, Step
from ...core.generation import generate as continuations
from ...core.speculation import Tally, speculate
from ...core.terminal import progress_bar, say
from ..commands import Generate
from ..config import DOCUMENT
from ..model import ByteLM
from ..stream import write_stream
from .common import load_model


def generate(args: Generate) -> None:
    """Continue the prompt on stdout; how it ended is said on stderr."""
    if any(not text for text in args.stop):
        raise InputError("--stop: an empty text would stop at once; give at least one character")
    given = np.frombuffer(_prompt(args), np.uint8)
    prompt = torch.from_numpy(np.concatenate(([DOCUMENT], given), dtype=np.int16))  # perhaps a large one
    model = load_model(args.run, args.compute)
    drafter = load_model(args.draft, args.compute) if isinstance(args.draft, Path) else args.draft
    ended: list[FinishReason | None] = []
    tally = Tally()
    with autocast(args.compute):
        steps = _steps(args, model, drafter, prompt, tally)
        write_stream(_bytes_of(steps, ended), sys.stdout.buffer, lossless=args.lossless)
    if sys.stdout.isatty():
        print()
    say("ended by the model or a --stop" if ended[-1] == "stop" else f"stopped after {args.max_new_bytes} bytes")
    if drafter is not None:
        say(
            f"drafts: {tally.kept} of {tally.drafted} bytes kept ({tally.acceptance_rate:.0%}), "
            f"{tally.tokens_per_forward:.2f} bytes for each forward of the model"
        )


def _steps(
    args: Generate, model: ByteLM, drafter: ByteLM | Literal["ngram"] | None, prompt: Tensor, tally: Tally
) -> Iterator[Step]:
    """Reads the prompt, and returns what follows it."""
    stop = [[DOCUMENT], *(os.fsencode(text) for text in args.stop)]
    n_read = len(prompt) * (2 if isinstance(drafter, ByteLM) else 1)
    with progress_bar("prompt", n_read, "bytes") as advance:
        options: Any = {"seeds": [args.compute.seed], "stop": stop, "advance": advance}
        if drafter is None:
            return continuations(model, [prompt], args.max_new_bytes, args.sampling, **options)
        settings = args.sampling, args.speculation
        return speculate(model, drafter, [prompt], args.max_new_bytes, *settings, **options, tally=tally)


def _bytes_of(steps: Iterator[Step], ended: list[FinishReason | None]) -> Iterator[bytes]:
    for step in steps:
        ended[:] = step.finished
        yield bytes(step.tokens[0])


def _prompt(args: Generate) -> bytes:
    """The prompt as it was given, byte by byte, even if it is no text."""
    if args.prompt is not None and args.prompt_file is not None:
        raise InputError("--prompt and --prompt-file: give one of them")
    if args.prompt_file is None:
        return os.fsencode(args.prompt or "")
    if str(args.prompt_file) == "-":
        return sys.stdin.buffer.read()
    try:
        return args.prompt_file.read_bytes()
    except OSError as error:
        raise InputError(f"{args.prompt_file}: cannot be read ({error.strerror})") from None
