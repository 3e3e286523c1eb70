"""Token by token continuation of a batch of prompts, by any model that carries a state.

    logits, state = prefill(model, prompts)            the prompts, of any lengths, in pieces of bounded memory
    for each new token:
        token = sample(next_token_probabilities(logits))
        logits = model.step(token, state)

`generate` yields what each step adds, `collect` gathers it; speculation.py finds the tokens in another way. A state
stands for all the tokens before it: keep one (`prefill`, `save_state`) and a long document is read once; repeat its
rows (`select_state`) and many continuations share that reading. Every row's result is its own: it depends on neither
its batch mates nor their number, short of the last bits of the arithmetic. Letters: B sequences, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from .config import SamplingConfig
from .errors import InputError
from .files import written_whole
from .graphed import GraphedDecoder, read_by_graph, serves
from .sampling import Draws, recent_tokens

CHUNK = 2048  # tokens of each prompt in one forward: enough to fill a GPU, few enough for any memory
GRAPHED = 16  # new tokens from which a CUDA graph pays
AS_THE_MODEL_SAYS = SamplingConfig()  # nothing filtered

# What the model says: lists, tuples and dicts of tensors whose first axis is the batch. Of those that grow with the
# sequence the second axis is room for tokens: as much as there happens to be, and none in `init_state`'s.
State = Any
FinishReason = Literal["stop", "length"]


class AutoregressiveModel(Protocol):
    """What generation asks of a model; `LanguageModel` has it."""

    def __call__(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        return_state: bool = False,
        padding_mask: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> Any:
        """tokens int64 (B, L) -> with return_state, (logits (B, L, V), the state after each row's last real token).

        `state` continues those sequences, and is not changed; padding_mask is bool (B, L), True for a real token.
        With logits_at, int64 (B,), only the logits (B, V) at that place of each row are made.
        """
        ...

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """One token for each sequence: int64 (B,) -> logits (B, V); `state` updated in place.

        On a GPU it is captured in a CUDA graph (graphed.py), so it may not wait for the GPU while that is done; a model
        whose steps are not all the same kernels says so by an attribute `step_is_one_graph`, False.

        Where a class has beside it a `step_likeliest(tokens, state, out: kernels.WayOut)`, that is called instead where
        nothing but the likeliest tokens is asked for: those go out (`kernels.hand_over`), and no logits come back.
        """
        ...

    def init_state(self, batch_size: int, max_length: int | None = None) -> State:
        """The state before the first token, on the model's device.

        max_length  of a state that grows: have room for so many tokens. Asked for where one grows, and else left out
        """
        ...


class Decoder(Protocol):
    """Writes a batch of sequences on: a way to find their next tokens."""

    def advance(self) -> list[list[int]]:
        """The next tokens of each sequence, one at least."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences of the batch alone."""
        ...

    def close(self) -> None:
        """Nothing more is asked."""


class Step(NamedTuple):
    """What one step adds to each prompt's continuation, in the order of the prompts."""

    tokens: list[list[int]]
    """New tokens: usually one; none while they may turn out to be a stop sequence, or after the end."""
    finished: list[FinishReason | None]
    """None while the sequence runs on."""


def generate(
    model: AutoregressiveModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    config: SamplingConfig = AS_THE_MODEL_SAYS,
    *,
    seeds: Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    state: State | None = None,
    chunk: int = CHUNK,
    advance: Callable[[int], object] = lambda n: None,
) -> Iterator[Step]:
    """Continue each prompt; yield a `Step` as soon as its tokens are known. The prompts are read before it returns.

    prompts         int (length,) each, on any device; at least one token each.
    max_new_tokens  at most so many for each prompt; then its finish reason is "length".
    seeds           one for each prompt: what is drawn for it depends on that alone. None: torch's generator gives them.
    stop            token sequences that end a continuation when they occur in it (not in the prompt), with the reason
                    "stop"; where two end at once, the longer one is meant. The stop sequence itself is not yielded:
                    what may be the beginning of one is held back until that is decided.
    state           continues sequences: row b stands before prompts[b]. It is not changed. The tokens before it are not
                    known here, so that the repetition penalty does not see them.
    chunk           prompts are read so many tokens at a time (of each prompt).
    advance         is told of the prompts' tokens that were read.

    Raises InputError for an empty prompt or stop sequence, and, while it runs, for logits that are not finite.
    """
    seeds = begin(prompts, max_new_tokens, seeds, stop)
    logits, state = prefill(model, prompts, state, chunk=chunk, advance=advance)
    draws = Draws(config, seeded(seeds), recent_tokens(prompts, max_new_tokens, config, logits))
    one_graph = getattr(model, "step_is_one_graph", True)
    if one_graph and max_new_tokens >= GRAPHED and isinstance(model, torch.nn.Module) and serves(logits.device):
        decoder: Decoder = GraphedDecoder(model, logits, state, draws, max_new_tokens)
    else:
        decoder = _OneByOne(model, logits, state, draws)
    return decode(decoder, len(prompts), max_new_tokens, stop)


def collect(steps: Iterable[Step]) -> list[list[int]]:
    """The continuation of each prompt as a whole: `collect(generate(...))`."""
    continuations: list[list[int]] = []
    for step in steps:
        # At once: lists that pile up make Python look through all of its objects for garbage, for 0.2 s each time.
        continuations = continuations or [[] for _ in step.tokens]
        for continuation, tokens in zip(continuations, step.tokens, strict=True):
            continuation += tokens
    return continuations


@torch.no_grad()
def prefill(
    model: AutoregressiveModel,
    prompts: Sequence[Tensor],
    state: State | None = None,
    *,
    chunk: int = CHUNK,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[Tensor, State]:
    """Read prompts of any lengths: (logits (B, V) of the token after each, the state after each).

    `state` continues sequences, row b standing before prompts[b]; it is not changed. At most `chunk` tokens of each
    prompt are read at a time, so memory does not grow with their lengths; the numbers are the same at any `chunk`.
    `advance` is told of the tokens that were read.
    """
    _check(model, prompts, state, chunk)
    tensors = model.parameters() if isinstance(model, torch.nn.Module) else pytree.tree_leaves(model.init_state(1))
    device = next((x.device for x in tensors), None)
    logits = None
    lengths = [prompt.numel() for prompt in prompts]  # `len` takes six times as long
    for start in range(0, max(lengths), chunk):
        rows = [row for row, length in enumerate(lengths) if length > start]
        pieces = [_piece(prompts[row], start, chunk) for row in rows]
        before = state if state is None or len(rows) == len(prompts) else select_state(state, rows)
        at_last, after = read(model, pieces, before, only_last=True, device=device)
        if logits is None or len(rows) == len(prompts):
            logits, state = at_last, after
        else:
            logits[rows] = at_last
            state, after = with_equal_room(state, after)
            for whole, part in zip(pytree.tree_leaves(state), pytree.tree_leaves(after), strict=True):
                whole[rows] = part
        advance(sum(piece.numel() for piece in pieces))
    assert logits is not None  # no prompt is empty
    return logits, state


def _piece(prompt: Tensor, start: int, chunk: int) -> Tensor:
    piece = prompt if start == 0 and prompt.numel() <= chunk else prompt[start : start + chunk]
    return piece if piece.dtype == torch.int64 else piece.long()


def read(
    model: AutoregressiveModel,
    pieces: list[Tensor],
    state: State | None,
    *,
    only_last: bool = False,
    device: torch.device | None = None,
) -> tuple[Tensor, State]:
    """One forward over pieces of any lengths, int64 (l,) each: (logits (B, L, V), the state after each piece).

    only_last  the logits are (B, V), those after each piece's last token
    device     where the model is, if the pieces are elsewhere: they are brought there as one
    """
    sizes = [piece.numel() for piece in pieces]
    equal = len(set(sizes)) == 1
    tokens, mask = (torch.stack(pieces) if equal else pad_sequence(pieces, batch_first=True)).to(device), None
    if only_last and state is None and equal:
        found = read_by_graph(model, tokens)
        if found is not None:
            return found
    lengths = torch.tensor(sizes, device=tokens.device)
    if not equal:
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    options = {"logits_at": lengths - 1} if only_last else {}
    logits, state = model(tokens, state, return_state=True, padding_mask=mask, **options)
    # A padded forward may hand out views of larger tensors: free those, and let `step` work in one piece of memory.
    return logits, pytree.tree_map(Tensor.contiguous, state)


def begin(
    prompts: Sequence[Tensor], max_new_tokens: int, seeds: Sequence[int] | None, stop: Sequence[Sequence[int]]
) -> Sequence[int]:
    """A seed for each prompt, given or drawn.

    Raises, before the prompts are read, for numbers of tokens and of seeds, seeds and stop sequences that cannot be.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist()
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; each needs its own")
    if any(len(sequence) == 0 for sequence in stop):
        raise InputError("a stop sequence is empty; it needs at least one token")
    seeded({min(seeds), max(seeds)} if len(seeds) else ())  # one out of range raises before the prompts are read
    return seeds


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """What draws for each prompt. Of many it takes a while to make: once a GPU has the prompts to read."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def decode(decoder: Decoder, n_prompts: int, max_new_tokens: int, stop: Sequence[Sequence[int]]) -> Iterator[Step]:
    """The loop of `generate`, by any decoder. Rows that have finished leave the batch."""
    try:
        yield from _decode(decoder, [StopFilter(stop) for _ in range(n_prompts)], max_new_tokens)
    finally:
        decoder.close()


def _decode(decoder: Decoder, filters: list["StopFilter"], max_new_tokens: int) -> Iterator[Step]:
    running = list(range(len(filters)))  # the prompt that each row of the batch belongs to
    n_left = [max_new_tokens] * len(filters)
    finished: list[FinishReason | None] = [None] * len(filters)
    while running:
        released: list[list[int]] = [[] for _ in filters]
        for prompt, tokens in zip(running, decoder.advance(), strict=True):
            tokens = tokens[: n_left[prompt]]
            released[prompt], stopped = filters[prompt].push_all(tokens)
            n_left[prompt] -= len(tokens)
            if stopped:
                finished[prompt] = "stop"
            elif n_left[prompt] == 0:
                released[prompt] += filters[prompt].held
                finished[prompt] = "length"
        yield Step(released, list(finished))
        kept = [row for row, prompt in enumerate(running) if finished[prompt] is None]
        if kept and len(kept) < len(running):
            decoder.keep(kept)
        running = [running[row] for row in kept]


class _OneByOne(Decoder):
    """A decoder that draws a token for each sequence, and then lets the model read it."""

    def __init__(self, model: AutoregressiveModel, logits: Tensor, state: State, draws: Draws):
        self.model, self.logits, self.state, self.draws = model, logits, state, draws
        self.unread: Tensor | None = None  # (B,), drawn last

    def advance(self) -> list[list[int]]:
        if self.unread is not None:
            self.logits = self.model.step(self.unread, self.state)
        self.unread = self.draws.draw(self.logits)
        return self.unread[:, None].tolist()

    def keep(self, rows: Sequence[int]) -> None:
        assert self.unread is not None  # it takes a token to finish a sequence
        self.unread, self.state = self.unread[rows], select_state(self.state, rows)
        self.draws.keep(rows)


class StopFilter:
    """Holds one sequence's tokens back while they may be the beginning of a stop sequence."""

    def __init__(self, stop: Iterable[Sequence[int]]):
        self.stop = {tuple(sequence) for sequence in stop}
        self.beginnings = {sequence[:n] for sequence in self.stop for n in range(1, len(sequence))}
        self.held: list[int] = []

    def push_all(self, tokens: list[int]) -> tuple[list[int], bool]:
        """`push` of each, until a stop sequence ends."""
        if not self.stop:
            return tokens, False
        released: list[int] = []
        for token in tokens:
            free, stopped = self.push(token)
            released += free
            if stopped:
                return released, True
        return released, False

    def push(self, token: int) -> tuple[list[int], bool]:
        """(tokens that no stop sequence can claim any more, whether one ends with this token)."""
        if not self.stop:
            return [token], False
        tokens = [*self.held, token]
        suffixes = [tuple(tokens[start:]) for start in range(len(tokens))]  # the longest first
        for start, suffix in enumerate(suffixes):
            if suffix in self.stop:
                self.held = []
                return tokens[:start], True
        n_free = next((start for start, suffix in enumerate(suffixes) if suffix in self.beginnings), len(tokens))
        self.held = tokens[n_free:]
        return tokens[:n_free], False


def select_state(state: State, rows: Sequence[int]) -> State:
    """A copy of these rows of a state, in this order. A row may come many times (a fork), or not at all."""
    on = cache(lambda device: torch.tensor(rows, dtype=torch.int64, device=device))  # to a GPU once, not for each layer
    return pytree.tree_map(lambda s: s.index_select(0, on(s.device)), state)


def with_equal_room(*states: State) -> list[State]:
    """The states of one model, with zeros appended where one has less room for tokens than another."""
    leaves, structures = zip(*(pytree.tree_flatten(state) for state in states), strict=True)
    equal = [_padded(group) if len({s.shape[1:2] for s in group}) > 1 else group for group in zip(*leaves, strict=True)]
    return [pytree.tree_unflatten([group[i] for group in equal], s) for i, s in enumerate(structures)]


def _padded(group: Sequence[Tensor]) -> list[Tensor]:
    room = max(s.shape[1] for s in group)
    return [torch.cat((s, s.new_zeros(len(s), room - s.shape[1], *s.shape[2:])), 1) for s in group]


def save_state(path: str | os.PathLike, state: State) -> None:
    """Write a state to a safetensors file, whole or not at all. The model that it belongs to is not written."""
    with written_whole(path) as beside:
        save_file({name: s.contiguous() for name, s in _named(state).items()}, beside)


def load_state(path: str | os.PathLike, model: AutoregressiveModel) -> State:
    """The state in a file of `save_state`, on the model's device.

    Raises InputError if the file cannot be read, or if its tensors are not those of this model's states. (The state of
    a model of the same shape, but with other weights, cannot be told apart.)
    """
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no state can be read from it ({error})") from None
    wanted = model.init_state(1)
    kinds = {name: (s.shape[1:], s.dtype) for name, s in _named(wanted).items()}
    growing = {name for name, (shape, _) in kinds.items() if shape[:1] == (0,)}
    found = {name: ((0, *s.shape[2:]) if name in growing else s.shape[1:], s.dtype) for name, s in saved.items()}
    if found != kinds:
        raise InputError(
            f"{path}: not a state of this model; states are saved from a model of the same shape and dtype"
        )
    leaves = [saved[name].to(s.device) for name, s in _named(wanted).items()]
    return pytree.tree_unflatten(leaves, pytree.tree_structure(wanted))


def _named(state: State) -> dict[str, Tensor]:
    """The tensors of a state by their place in it, such as "[0].conv", in order."""
    return {pytree.keystr(path): s for path, s in pytree.tree_flatten_with_path(state)[0]}


def _check(model: AutoregressiveModel, prompts: Sequence[Tensor], state: State | None, chunk: int) -> None:
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode, where dropout changes its answers; call model.eval() first")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if not prompts:
        raise ValueError("no prompts; give at least one")
    for i, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.is_floating_point():
            raise ValueError(f"prompt {i} is {prompt.dtype} {tuple(prompt.shape)}; it must be integer, (length,)")
        if prompt.numel() == 0:
            raise InputError(f"prompt {i} is empty; it needs at least one token to continue from")
    n_rows = set() if state is None else {len(s) for s in pytree.tree_leaves(state)}
    if n_rows - {len(prompts)}:
        raise ValueError(f"the state has {sorted(n_rows)} rows for {len(prompts)} prompts; `select_state` repeats rows")
