"""What simple models make of a text, in bits per byte: what a byte model's figures are to be compared with.

    python benchmarks/byte_baselines.py TRAIN TEST

order n     a byte from the n bytes before it: counts in TRAIN, interpolated with order n-1 and so on down to a uniform
            distribution after Witten and Bell (1991), a context's weight for it being how many bytes differ after it
own order 0 the entropy of TEST's own byte frequencies
xz          TEST alone, `xz -9`; primed: what it adds to TRAIN
"""

import argparse
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def order_bits(train: np.ndarray, test: np.ndarray, order: int) -> Iterator[float]:
    """Bits per byte of `test` by the models of orders 0, 1, ..., `order` (at most 6). Both are uint8."""
    p = np.full(len(test), 1 / 256)
    for n in range(order + 1):
        grams, counts = np.unique(_grams(train, n), return_counts=True)
        contexts, first = np.unique(grams >> 8, return_index=True)
        n_different = np.diff(first, append=len(grams))
        n_seen = np.add.reduceat(counts, first)
        wanted = _grams(test, n)
        count, _ = _looked_up(wanted, grams, counts)
        seen, known = _looked_up(wanted >> 8, contexts, n_seen)
        different, _ = _looked_up(wanted >> 8, contexts, n_different)
        lower = p[n:]
        p[n:] = np.where(known, (count + different * lower) / np.maximum(seen + different, 1), lower)
        yield float(-np.log2(p).mean())


def _grams(data: np.ndarray, n: int) -> np.ndarray:
    """Each byte from the n-th on with the n before it, as a number."""
    grams = np.zeros(len(data) - n, np.int64)
    for i in range(n + 1):
        grams = grams << 8 | data[i : len(data) - n + i]
    return grams


def _looked_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of the wanted keys (0 where there is none), and whether there is one."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    known = keys[at] == wanted
    return np.where(known, values[at], 0), known


def xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    args = parser.parse_args()
    train, test = args.train.read_bytes(), args.test.read_bytes()
    shares = np.bincount(np.frombuffer(test, np.uint8)) / len(test)
    print(f"{'own order 0':<12}{-np.sum(shares[shares > 0] * np.log2(shares[shares > 0])):.3f}")
    for n, bits in enumerate(order_bits(np.frombuffer(train, np.uint8), np.frombuffer(test, np.uint8), 6)):
        print(f"{f'order {n}':<12}{bits:.3f}")
    print(f"{'xz':<12}{8 * xz_size(test) / len(test):.3f}")
    print(f"{'xz primed':<12}{8 * (xz_size(train + test) - xz_size(train)) / len(test):.3f}")
