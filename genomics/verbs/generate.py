"""`polymamba genomics generate`: a next-nucleotide model writes DNA."""

import sys
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from ...core.device import autocast
from ...core.errors import InputError
from ...core.files import require_writable, written_whole
from ...core.generation import generate as continuations
from ...core.language_model import LanguageModel
from ...core.terminal import progress_bar
from ..alphabet import BOS, LetterError, decode, tokenize
from ..language_commands import Generate
from ..reading.files import files_of
from ..reading.records import read_records
from ..tokenizers import Tokenizer, is_asked
from .language import load_reader

WIDTH = 60  # letters in a line
AT_ONCE = 64  # sequences


class OnlyBases(nn.Module):
    """A language model that can write nothing but A, C, G and T, or tokens of several of them."""

    bases: Tensor

    def __init__(self, model: LanguageModel, n_ids: int):
        """n_ids   of the tokenizer; what is above them only pads the model's tables"""
        super().__init__()
        self.model = model
        forbidden = torch.full((model.config.vocab_size,), -torch.inf)
        allowed = np.arange(n_ids)
        forbidden[torch.from_numpy(allowed[is_asked(allowed)])] = 0
        self.register_buffer("bases", forbidden.to(next(model.parameters()).device))
        self.eval()

    def forward(self, tokens: Tensor, state: Any = None, **options: Any) -> Any:
        out = self.model(tokens, state, **options)
        return (out[0] + self.bases, out[1]) if isinstance(out, tuple) else out + self.bases

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        return self.model.step(tokens, state) + self.bases

    def init_state(self, batch_size: int, max_length: int | None = None) -> Any:
        return self.model.init_state(batch_size, max_length)


def generate(args: Generate) -> None:
    """Sequences that begin with the prompts."""
    if args.output is not None:
        require_writable(args.output)
    prompts = list(_prompts(args))
    reader = load_reader(args.run, args.compute)
    if reader.objective != "next":
        raise InputError(f"{args.run}: a masked model, which sees both ways; generate needs one of --objective next")
    model = OnlyBases(reader.model, reader.tokenizer.vocab_size)
    with autocast(args.compute), torch.no_grad():
        if args.output is None:
            _write(sys.stdout, args, model, reader.tokenizer, prompts)
        else:
            with written_whole(args.output) as beside, beside.open("w", encoding="utf-8") as file:
                _write(file, args, model, reader.tokenizer, prompts)


def _prompts(args: Generate) -> Iterator[tuple[str, np.ndarray]]:
    """Name and tokens of each prompt."""
    if not args.prompts:
        try:
            yield "generated", tokenize(args.prompt)
        except LetterError as error:
            raise InputError(f"--prompt: {error}") from None
    for path in files_of(args.prompts):
        for record in read_records(path):
            yield record.name, record.tokens


def _write(
    file: TextIO, args: Generate, model: OnlyBases, tokenizer: Tokenizer, prompts: list[tuple[str, np.ndarray]]
) -> None:
    wanted = [(f"{name}_{i + 1}", ids) for name, ids in prompts for i in range(args.number)]
    with progress_bar("generate", len(wanted) * args.length, "bases") as advance:
        for first in range(0, len(wanted), AT_ONCE):
            batch = wanted[first : first + AT_ONCE]
            given = [torch.from_numpy(np.append(BOS, tokenizer.encode(bases)[0])) for _, bases in batch]
            seeds = [args.compute.seed + first + i for i in range(len(batch))]
            written: list[list[int]] = [[] for _ in batch]
            for step in continuations(model, given, args.length, args.sampling, seeds=seeds):
                for tokens, new in zip(written, step.tokens, strict=True):
                    tokens += new
                advance(len(batch))
            for (name, bases), ids in zip(batch, written, strict=True):
                new = tokenizer.decode(np.array(ids))[: args.length]
                letters = decode(np.concatenate((bases, new)))
                lines = [letters[i : i + WIDTH] for i in range(0, len(letters), WIDTH)]
                file.write(f">{name} {len(new)} bases after {len(bases)}\n" + "\n".join(lines) + "\n")
