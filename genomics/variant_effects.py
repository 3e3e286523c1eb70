"""What a language model says of variants: ln P(allele in its place) - ln P(reference allele), LLR, for each allele.

causal    P of the allele and of what follows it, given what stands before. Reference and allele are compared over as
          many bases, so that a deletion does not win by being shorter: what follows reaches accordingly farther. What
          stands before is read once for all alleles of a place.
masked    P of the allele's bases, each while it alone is hidden. Again over as many bases: those of the longest of the
          two, the shorter one's with those that follow it. Of a substitution of one base that is one forward.

The other strand is the same question asked of the reverse complement. N is read as N, and is not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.batching import CPU_TOKENS, pad_right
from ..core.generation import select_state
from .alphabet import BOS, MASK, PAD, A, T, reverse_complement
from .config import Objective


class Site(NamedTuple):
    """A place of a genome and what may stand there. Tokens, uint8."""

    before: np.ndarray  # the bases before it, `flank` of them, fewer at the contig's start
    after: np.ndarray  # those after the reference allele
    alleles: list[np.ndarray]  # the reference first


def flank(window: int) -> int:
    """How many bases a site needs on either side for windows of so many."""
    return window - window // 2


def other_strand(site: Site) -> Site:
    alleles = [reverse_complement(allele) for allele in site.alleles]
    return Site(reverse_complement(site.after), reverse_complement(site.before), alleles)


@torch.no_grad()
def llrs(
    model: Any, sites: Sequence[Site], objective: Objective, window: int, max_tokens: int, *, both_strands: bool
) -> list[np.ndarray]:
    """Of each site the LLR of each allele but the first, float64 (alleles - 1,), by windows of so many bases.

    both_strands   the mean of both strands' LLRs
    """
    if next(model.parameters()).device.type == "cpu":
        max_tokens = min(max_tokens, CPU_TOKENS)
    of_strand = _causal if objective == "next" else _masked
    strands = [list(sites), *([list(map(other_strand, sites))] if both_strands else [])]
    found = [of_strand(model, strand, window, max_tokens) for strand in strands]
    return [np.mean(of_site, axis=0) for of_site in zip(*found, strict=True)]


def _causal(model: Any, sites: list[Site], window: int, max_tokens: int) -> list[np.ndarray]:
    device = next(model.parameters()).device
    n_before, n_rest = window // 2, flank(window)
    prefixes, rests = [], []
    for site in sites:
        prefixes.append(np.concatenate(([np.uint8(BOS)], _last(site.before, n_before))))
        rest = [np.concatenate((allele, site.after))[:n_rest] for allele in site.alleles]
        n_common = min(map(len, rest))
        rests.append([r[:n_common] for r in rest])
    found: list[np.ndarray] = [np.empty(0)] * len(sites)
    by_shape: dict[tuple[int, int], list[int]] = {}  # those of one shape together: no padding
    for i in range(len(sites)):
        by_shape.setdefault((len(prefixes[i]), len(rests[i][0])), []).append(i)
    sizes = [window + n_rest * len(rest) for rest in rests]
    for batch in (batch for members in by_shape.values() for batch in _batches(members, sizes, max_tokens)):
        rows = np.repeat(np.arange(len(batch)), [len(rests[i]) for i in batch])  # of each allele its site's
        prefix = _on_device(np.stack([prefixes[i] for i in batch]), device)
        alleles = _on_device(np.stack([rest for i in batch for rest in rests[i]]), device)
        last = torch.full((len(batch),), prefix.shape[1] - 1, device=device)
        at_first, state = model(prefix, return_state=True, logits_at=last)
        at_others = model(alleles[:, :-1], select_state(state, rows.tolist())) if alleles.shape[1] > 1 else None
        at_first = at_first[torch.from_numpy(rows).to(device)][:, None]
        logits = at_first if at_others is None else torch.cat((at_first, at_others), 1)
        likelihoods = _of_bases(logits, alleles).sum(1).cpu().numpy()
        of_sites = np.split(likelihoods, np.flatnonzero(np.diff(rows)) + 1)
        for i, of_site in zip(batch, of_sites, strict=True):
            found[i] = of_site[1:] - of_site[0]
    return found


def _masked(model: Any, sites: list[Site], window: int, max_tokens: int) -> list[np.ndarray]:
    n_before, n_rest = window // 2, flank(window)
    rows: list[tuple[np.ndarray, int]] = []  # a window, and the place in it that is hidden
    asked: list[list[tuple[int, int, int, int]]] = []  # of each site: allele, whether for or against it, row, base
    for site in sites:
        before = _last(site.before, n_before)
        questions = []
        of_all = None  # the row in which a single base is hidden: the same window for every base
        for k, allele in enumerate(site.alleles[1:]):
            n = max(len(allele), len(site.alleles[0]))
            is_single = n == 1
            pair = [np.concatenate((before, one, site.after)) for one in (allele, site.alleles[0])]
            n = min(n, *(len(whole) - len(before) for whole in pair))
            for sign, whole in zip((1, -1), pair, strict=True):
                whole = whole[: len(before) + max(n_rest, n)]
                for place in range(len(before), len(before) + n):
                    if not A <= whole[place] <= T:
                        continue
                    if not is_single or of_all is None:
                        rows.append((whole, place))
                        of_all = len(rows) - 1 if is_single else of_all
                    row = of_all if is_single and of_all is not None else len(rows) - 1
                    questions.append((k, sign, row, int(whole[place])))
        asked.append(questions)
    log_p = _at_hidden(model, rows, max_tokens)
    found = [np.zeros(len(site.alleles) - 1) for site in sites]
    for of_site, questions in zip(found, asked, strict=True):
        for k, sign, row, base in questions:
            of_site[k] += sign * log_p[row, base]
    return found


def _at_hidden(model: Any, rows: Sequence[tuple[np.ndarray, int]], max_tokens: int) -> np.ndarray:
    """Log-probabilities of every token (rows, V), float64, where each window's place is hidden."""
    device = next(model.parameters()).device
    found = np.empty((len(rows), 0))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for batch in _batches(order, [len(window) for window, _ in rows], max_tokens):
        tokens, mask = pad_right([rows[i][0] for i in batch], PAD)
        places = torch.tensor([rows[i][1] for i in batch])
        each = torch.arange(len(batch))
        tokens[each, places] = MASK
        options = {} if mask.all() else {"padding_mask": mask.to(device)}
        logits = model(tokens.to(device), **options)[each.to(device), places.to(device)]
        log_p = logits.float().log_softmax(-1).cpu().double().numpy()
        if not found.shape[1]:
            found = np.empty((len(rows), log_p.shape[1]))
        found[batch] = log_p
    return found


def _last(tokens: np.ndarray, n: int) -> np.ndarray:
    """The last n tokens; fewer, if there are no more."""
    return tokens[max(0, len(tokens) - n) :]


def _on_device(tokens: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(tokens).to(device).long()


def _of_bases(logits: Tensor, tokens: Tensor) -> Tensor:
    """ln of the probability of each token, float64 (B, L); 0 for what is no base."""
    log_p = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return torch.where((tokens >= A) & (tokens <= T), log_p.double(), 0.0)


def _batches(order: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in this order, in batches of at most max_tokens by their sizes, one at least."""
    batches: list[list[int]] = []
    n_tokens = max_tokens
    for i in order:
        n_tokens += sizes[i]
        if n_tokens > max_tokens:
            batches.append([])
            n_tokens = sizes[i]
        batches[-1].append(i)
    return batches
