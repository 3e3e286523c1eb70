"""ListOps as Long Range Arena generates it (arXiv 2011.04006; the task: 1804.06028).

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]        the answer is one of ten digits

A node is an operation with probability 1/4, if its depth allows, else a digit; an operation has 2 to `most_arguments`
arguments. A tree is kept if it has more than `shortest` and fewer than `longest` tokens, the brackets that close among
them, drawn again otherwise. MED is the median, rounded down; SM the sum modulo 10.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

OPERATIONS = ("MIN", "MAX", "MED", "SM")
NAMES = (*map(str, range(10)), *(f"[{name}" for name in OPERATIONS), "]", "<pad>")
END, PADDING = 14, 15
SHARD = 1000  # examples that have a seed of their own, so that threads can share the work


@numba.njit(cache=True)
def _evaluated(operation, values):
    if operation == 10:
        return values.min()
    if operation == 11:
        return values.max()
    if operation == 12:
        return int(np.median(values))
    return values.sum() % 10


@numba.njit(cache=True)
def _tree(row, longest, most_depth, most_arguments, waiting, operation, values, n_values):
    """Writes one tree, in the order that it is read in: (its tokens, or `longest` if they would be more; its value)."""
    depth, n = 0, 0  # operations that are open
    while True:
        if n >= longest:
            return longest, 0
        if depth and waiting[depth] == 0:
            row[n] = END
            result = _evaluated(operation[depth], values[depth, : n_values[depth]])
            depth -= 1
        elif depth + 1 < most_depth and np.random.random() < 0.25:
            if depth:
                waiting[depth] -= 1
            depth += 1
            operation[depth] = row[n] = 10 + np.random.randint(4)
            waiting[depth] = 2 + np.random.randint(most_arguments - 1)
            n_values[depth] = 0
            n += 1
            continue
        else:
            result = row[n] = np.random.randint(10)
            if depth:
                waiting[depth] -= 1
        n += 1
        if depth == 0:
            return n, result
        values[depth, n_values[depth]] = result
        n_values[depth] += 1


@numba.njit(cache=True, nogil=True)
def _generate(tokens, lengths, answers, seed, shortest, longest, most_depth, most_arguments):
    np.random.seed(seed)
    waiting = np.zeros(most_depth + 1, np.int64)
    operation, n_values = np.zeros_like(waiting), np.zeros_like(waiting)
    values = np.zeros((most_depth + 1, most_arguments), np.int64)
    for i in range(len(tokens)):
        n = 0
        while n <= shortest or n >= longest:
            n, answers[i] = _tree(tokens[i], longest, most_depth, most_arguments, waiting, operation, values, n_values)
        lengths[i] = n
        tokens[i, n:] = PADDING


def listops(
    n: int, seed: int, shortest: int = 500, longest: int = 2000, most_depth: int = 10, most_arguments: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n examples: (tokens uint8 (n, longest) padded on the right, lengths (n,), answers (n,))."""
    tokens = np.empty((n, longest), np.uint8)
    lengths, answers = np.empty(n, np.int64), np.empty(n, np.int64)

    def generate(start: int) -> None:  # numba has a random state in each thread
        part = slice(start, start + SHARD)
        made = tokens[part], lengths[part], answers[part]
        _generate(*made, seed * 10_000 + start // SHARD, shortest, longest, most_depth, most_arguments)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(generate, range(0, n, SHARD)))
    return tokens, lengths, answers
