"""The selective scan against official numbers, by every backend."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from polymamba.kernels import selective_scan

GOLDEN = Path(__file__).parents[1] / "golden" / "selective_scan"
GOLDEN_CASES = json.loads((GOLDEN / "config.json").read_text())
FAST = ["numba", "triton", "cuda"]


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, results) of a case, from the official layout (B, D, L) into ours."""
    prefix = case + "."
    stored = {
        k.removeprefix(prefix): x for k, x in load_file(GOLDEN / "io.safetensors").items() if k.startswith(prefix)
    }
    is_complex = stored["A"].dim() == 3

    def ours(name: str, x: Tensor) -> Tensor:
        kind = name.removeprefix("grad_")
        if kind in ("A", "last_state"):
            return torch.view_as_complex(x) if is_complex else x
        if kind in ("B", "C"):
            if x.dim() == 2:
                return x
            if is_complex:  # real and imaginary parts interleaved along time
                return torch.view_as_complex(rearrange(x, "b n (l two) -> b l n two", two=2).contiguous())
            return rearrange(x, "b ... n l -> b l ... n")
        return x.mT if x.dim() == 3 else x

    stored = {name: ours(name, x) for name, x in stored.items()}
    results = {name: x for name, x in stored.items() if name.startswith("grad_")}
    results |= {"y": stored["out"], "final_state": stored["last_state"], "dout": stored["dout"]}
    return {name: x for name, x in stored.items() if f"grad_{name}" in stored}, results


def golden_runs() -> Iterator:
    """(case, backend); the long cases are slow in the interpreter."""
    for case, options in GOLDEN_CASES.items():
        for backend in ["reference", "torch", *FAST]:
            if options["cplx"] and backend in ("numba", "cuda"):
                continue
            is_slow = backend == "triton" and not torch.cuda.is_available() and options["L"] * options["G"] > 500
            yield pytest.param(case, backend, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize(("case", "backend"), list(golden_runs()))
def test_official_numbers(case, backend, results_of, cast, assert_close):
    tensors, expected = golden(case)
    exact = backend not in FAST
    options = {"delta_softplus": GOLDEN_CASES[case]["softplus"], "return_final_state": True}
    no_gradient = torch.zeros_like(expected["final_state"])
    actual = results_of(
        *(selective_scan, cast(tensors, torch.float64 if exact else torch.float32), backend),
        *((expected["dout"], no_gradient),),
        **options,
    )
    assert_close(actual, expected, 1e-9 if exact else 2e-5, f"{case}, {backend}")
