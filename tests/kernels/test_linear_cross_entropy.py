"""The cross-entropy of a linear head: both backends against PyTorch's own on all logits, in float64."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polymamba.kernels import linear_cross_entropy

interface = import_module("polymamba.kernels.linear_cross_entropy.interface")
BACKENDS = ["torch", "triton"]


def problem(tokens: int, words: int, width: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    x, weight = torch.randn(tokens, width, dtype=torch.float64), torch.randn(words, width, dtype=torch.float64)
    return {"x": x, "weight": weight}, torch.randint(words, (tokens,))


def run(x: Tensor, weight: Tensor, *, targets: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return F.cross_entropy(F.linear(x, weight), targets)
    return linear_cross_entropy(x, weight, targets, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "words", "logits"), [(1, 1, 9), (7, 13, 40), (19, 300, 700), (3, 4099, 1)])
def test_against_all_logits(tokens, words, logits, backend, results_of, cast, assert_close, monkeypatch):
    """`logits` at once: in pieces of 2 or 1 rows and a rest, and in one."""
    monkeypatch.setattr(interface, "LOGITS", logits)
    tensors, targets = problem(tokens, words)
    targets[1::3] = -100
    expected = results_of(run, tensors, "reference", targets=targets)
    assert_close(results_of(run, cast(tensors, torch.float32), backend, targets=targets), expected, 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_beside_a_weight_in_float32(backend, results_of, cast, assert_close):
    tensors, targets = problem(12, 40)
    tensors = cast(tensors, torch.float32) | {"x": tensors["x"].bfloat16()}
    actual = results_of(run, tensors, backend, targets=targets)
    assert [actual[name].dtype for name in ("y", "grad_x", "grad_weight")] == [
        torch.float32, torch.bfloat16, torch.float32,
    ]  # fmt: skip
    assert_close(actual, results_of(run, cast(tensors, torch.float64), "reference", targets=targets), 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_that_are_impossible_and_nothing_to_predict(backend, device_of):
    device = device_of(backend)
    x = torch.tensor([[1.0], [2.0]], device=device, requires_grad=True)
    weight = torch.tensor([[-torch.inf], [-torch.inf], [1.0], [0.5]], device=device)
    targets = torch.tensor([2, 3], device=device)
    loss = linear_cross_entropy(x, weight, targets, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight), targets))
    nothing = linear_cross_entropy(x, weight[2:], torch.full_like(targets, -100), backend=backend)
    (gradient,) = torch.autograd.grad(nothing, x)
    assert nothing.isnan()
    assert not gradient.any()


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_only_what_is_trained_has_a_gradient(trained):
    tensors, targets = problem(7, 13)
    tensors[trained].requires_grad_()
    linear_cross_entropy(**tensors, targets=targets).backward()
    assert [name for name, x in tensors.items() if x.grad is not None] == [trained]


def test_without_gradients_it_is_the_same_and_there_are_none_of_second_order():
    tensors, targets = problem(7, 13)
    x = tensors["x"].requires_grad_()
    loss = linear_cross_entropy(**tensors, targets=targets)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(**tensors, targets=targets), loss)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiled():
    tensors, targets = problem(7, 13)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tensors, targets=targets), linear_cross_entropy(**tensors, targets=targets))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \(3, 2\), \(4, 2\) and \(2,\)"):
        linear_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.gpu
def test_at_size(results_of, cast, assert_close):
    tensors, targets = problem(5000, 50288, 64)
    tensors = {"x": tensors["x"].bfloat16(), "weight": tensors["weight"].float() * 0.1}
    actual, again = (results_of(run, tensors, "triton", targets=targets) for _ in range(2))
    assert all(map(torch.equal, actual.values(), again.values()))
    exact = results_of(run, cast(tensors, torch.float64), "reference", device="cuda", targets=targets)
    assert_close(actual, exact, 2e-2)


@pytest.mark.gpu
def test_a_target_that_is_no_word_makes_it_nan():
    x, weight = torch.randn(3, 8, device="cuda"), torch.randn(5, 8, device="cuda")
    assert linear_cross_entropy(x, weight, torch.tensor([0, 5, 1], device="cuda")).isnan()


def test_gradients_in_bfloat16_have_no_common_error(results_of, cast):
    """1 / count is not rounded to x's dtype: 1 / 900 would be off by 0.25 %, over all of the gradient alike."""
    tensors, targets = problem(900, 7)
    tensors = {"x": tensors["x"].bfloat16(), "weight": tensors["weight"].bfloat16().float()}
    actual = results_of(run, tensors, "torch", targets=targets)["grad_x"].double()
    expected = results_of(run, cast(tensors, torch.float64), "reference", targets=targets)["grad_x"]
    assert ((actual * expected).sum() / expected.square().sum()).item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend, device_of):
    device = device_of(backend)
    x, weight = (torch.ones(n, 3, device=device, requires_grad=True) for n in (0, 5))
    loss = linear_cross_entropy(x, weight, torch.ones(0, dtype=torch.int64, device=device), backend=backend)
    loss.backward()
    assert loss.isnan()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)
