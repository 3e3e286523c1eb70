"""`polymamba bytes generate`: a model writes on, and what it writes appears at once."""

import os
import sys
from collections.abc import Iterator

import torch

from ...core.errors import InputError
from ...core.generation import FinishReason, Step
from ...core.generation import generate as continuations
from ...core.terminal import say
from ...core.train import autocast
from ..commands import Generate
from ..config import DOCUMENT
from ..stream import write_stream
from .common import load_model


def generate(args: Generate) -> None:
    """Continue the prompt on stdout; how it ended is said on stderr."""
    if any(not text for text in args.stop):
        raise InputError("--stop: an empty text would stop at once; give at least one character")
    prompt = torch.tensor([DOCUMENT, *_prompt(args)])
    model = load_model(args.run, args.compute)
    stop = [[DOCUMENT], *(os.fsencode(text) for text in args.stop)]
    ended: list[FinishReason | None] = []
    with autocast(args.compute):
        steps = continuations(model, [prompt], args.max_new_bytes, args.sampling, seeds=[args.compute.seed], stop=stop)
        write_stream(_bytes_of(steps, ended), sys.stdout.buffer, lossless=args.lossless)
    if sys.stdout.isatty():
        print()
    say("ended by the model or a --stop" if ended[-1] == "stop" else f"stopped after {args.max_new_bytes} bytes")


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
