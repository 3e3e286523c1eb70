"""The kernels as PyTorch operators: what torch.compile, export and autograd rely on; and which backend is chosen."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import polymamba.kernels
from polymamba.kernels import causal_conv1d, causal_conv1d_step, info, layer_norm, selective_scan, selective_scan_step
from polymamba.kernels.backends import choose

OPERATORS = torch.ops.polymamba
BACKENDS = ["torch", "numba", "triton", "cuda"]


def scan_inputs(device: str, length: int = 6, channels: int = 4, states: int = 3) -> tuple[torch.Tensor, ...]:
    """u, delta, A, B, C, D, z, delta_bias of the operator: tokens are flat."""
    by_channel, by_state = (length, channels), (length, 2, states)
    shapes = (by_channel, by_channel, (channels, states), by_state, by_state, (channels,), by_channel, (channels,))
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    tensors[2] = -tensors[2].abs()
    return tuple(x.requires_grad_() for x in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_scan_operator(packed, backend, device_of):
    device = device_of(backend)
    # No empty sequence: its slot of the saved states is never written, and opcheck compares these as well.
    ends = torch.tensor([0, 2, 6], dtype=torch.int32, device=device) if packed else None
    state = torch.randn(2, 4, 3, device=device, requires_grad=True)
    arguments = (*scan_inputs(device), state, ends, 1 if packed else 2, True, False, True, backend)
    torch.library.opcheck(OPERATORS.selective_scan.default, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton_complex"])
def test_scan_operator_of_complex_decay(backend, device_of):
    u, delta, A, B, C, *rest = scan_inputs(device_of("triton" if backend == "triton_complex" else backend))
    A, B, C = (torch.complex(x, 0.5 * x).detach().requires_grad_() for x in (A, B, C))
    arguments = (u, delta, A, B, C, *rest, None, None, 2, True, False, True, backend)
    torch.library.opcheck(OPERATORS.selective_scan.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_operator_with_all_options_absent(backend, device_of):
    u, delta, A, B, C, *_ = scan_inputs(device_of(backend))
    arguments = (u, delta, A, B, C, None, None, None, None, None, 2, False, True, True, backend)
    torch.library.opcheck(OPERATORS.selective_scan.default, arguments)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_conv_operator(backend, device_of):
    device = device_of(backend)
    x, weight, bias, state = (
        torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 5), (5, 4), (5,), (2, 5, 3))
    )
    torch.library.opcheck(OPERATORS.causal_conv1d.default, (x, weight, bias, state, None, 2, True, False, backend))
    torch.library.opcheck(OPERATORS.causal_conv1d.default, (x, weight, None, None, None, 2, False, True, backend))


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_norm_operator(backend, device_of):
    device = device_of(backend)
    x, residual, weight, bias = (
        torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 5), (6, 5), (5,), (5,))
    )
    norm = OPERATORS.norm.default
    torch.library.opcheck(norm, (x, residual, weight, bias, 1e-5, True, torch.float32, backend))
    half = torch.bfloat16
    torch.library.opcheck(
        norm, (x.detach().to(half).requires_grad_(), residual, weight, None, 1e-5, False, half, backend)
    )
    torch.library.opcheck(norm, (x, None, weight, None, 1e-5, False, torch.float32, backend))


def test_step_operators(device_of):
    device = device_of("triton")
    u, delta, A, B, C, D, z, bias = (x.detach() for x in scan_inputs(device, length=2))
    state = torch.randn(2, 4, 3, device=device)
    torch.library.opcheck(OPERATORS.selective_scan_step.default, (state, u, delta, A, B, C, D, z, bias, True))
    weight, window = torch.randn(4, 4, device=device), torch.randn(2, 4, 3, device=device)
    torch.library.opcheck(OPERATORS.causal_conv1d_step.default, (window, u, weight, bias, True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_as_one_graph(backend, device_of):
    """Norm into convolution into scan, forward, backward and states; then at another length."""
    device = device_of(backend)
    other = "triton" if backend == "cuda" else backend  # only the scan has kernels in CUDA C++
    weight, A = torch.randn(4, 4, device=device), -torch.rand(4, 3, device=device)

    def layer(x, delta, B, C):
        x, delta = layer_norm(x, weight[0], residual=delta, backend=other)
        u, window = causal_conv1d(x, weight, return_final_state=True, backend=other)
        y, state = selective_scan(u, delta, A, B, C, z=x, delta_softplus=True, return_final_state=True, backend=backend)
        return y, window, state

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (5, 7):
        shapes = (2, length, 4), (2, length, 4), (2, length, 3), (2, length, 3)
        results = []
        inputs = [torch.randn(shape, device=device) for shape in shapes]
        for function in (layer, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs]
            outputs = function(*leaves)
            sum(x.square().sum() for x in outputs).backward()
            results.append((*outputs, *(x.grad for x in leaves)))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    """Steps and whole sequences: no synchronisation, no copy from the host."""
    x = torch.randn(2, 9, 4, device="cuda")
    B, A, weight = (
        torch.randn(2, 9, 3, device="cuda"),
        -torch.rand(4, 3, device="cuda"),
        torch.randn(4, 4, device="cuda"),
    )
    state, window = torch.zeros(2, 4, 3, device="cuda"), torch.zeros(2, 4, 3, device="cuda")

    def run():
        u = causal_conv1d(x, weight)
        step = selective_scan_step(state, causal_conv1d_step(window, x[:, 0], weight), x[:, 0], A, B[:, :1], B[:, :1])
        return selective_scan(u, x, A, B, B, delta_softplus=True), step

    run()
    expected, _ = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = run()
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_a_step_takes_no_gradient():
    state = torch.zeros(2, 4, 3)
    u, delta, A, B, C, *_ = scan_inputs("cpu", length=2)
    assert not selective_scan_step(state, u, delta, A, B, C, backend="reference").requires_grad


@pytest.mark.parametrize(
    ("device", "dtype", "is_complex", "expected"),
    [
        ("cpu", torch.float32, False, "numba"),
        ("cpu", torch.bfloat16, False, "numba"),
        ("cpu", torch.float64, False, "torch"),
        ("cpu", torch.float32, True, "torch"),
        ("cuda", torch.float32, False, "triton"),
        ("cuda", torch.float32, True, "torch"),
        ("mps", torch.float32, False, "torch"),
    ],
)
def test_the_choice_of_a_backend(device, dtype, is_complex, expected, device_of):
    device_of(expected)
    assert choose(None, torch.device(device), dtype, is_complex=is_complex) == expected


def test_where_a_kernel_in_cuda_is_chosen(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr("polymamba.kernels.backends.INSTALLED", {"triton": True, "numba": True, "cuda": True})
    assert choose(None, cuda, torch.bfloat16, in_cuda=True) == "cuda"
    assert choose(None, cuda, torch.bfloat16) == "triton"
    assert choose(None, cuda, torch.float64, in_cuda=True) == "torch"
    assert choose(None, cuda, torch.float32, is_complex=True, in_cuda=True) == "torch"
    assert choose(None, cuda, torch.float32, is_complex=True, in_cuda=True, complex_in_triton=True) == "triton"
    assert choose(None, torch.device("cpu"), torch.float32, is_complex=True, complex_in_triton=True) == "torch"
    assert choose("triton", cuda, torch.float32, in_cuda=True) == "triton"
    with pytest.raises(ValueError, match="no kernel in CUDA"):
        choose("cuda", cuda, torch.float32)
    with pytest.raises(ValueError, match="'cuda' does not take complex A: use backend='triton', 'torch' or"):
        choose("cuda", cuda, torch.float32, is_complex=True, in_cuda=True, complex_in_triton=True)
    with pytest.raises(ValueError, match="'cuda' does not take float64"):
        choose("cuda", cuda, torch.float64, in_cuda=True)
    with pytest.raises(ValueError, match="runs on a CUDA GPU; the inputs are on cpu"):
        choose("cuda", torch.device("cpu"), torch.float32, in_cuda=True)
    monkeypatch.setattr("polymamba.kernels.backends.INSTALLED", {"triton": True, "numba": True, "cuda": False})
    assert choose(None, cuda, torch.bfloat16, in_cuda=True) == "triton"
    with pytest.raises(ValueError, match="needs Triton and a PyTorch that is built with CUDA"):
        choose("cuda", cuda, torch.float32, in_cuda=True)


def test_a_backend_for_another_device_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend='numba' runs on the CPU; the inputs are on cuda"):
        choose("numba", torch.device("cuda"), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' runs on a CUDA GPU; the inputs are on cpu"):
        choose("triton", torch.device("cpu"), torch.float32)


def test_info_names_every_kernel():
    others = {"Journal", "MambaWeights", "Order", "WayOut", "info", "plain_operations"}
    others.add("mamba_stack_step")  # bf16 alone
    assert {line.split()[0] for line in info()} == set(polymamba.kernels.__all__) - others


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_the_operators():
    """Without gradients an implementation is called by itself; never where a tracer would miss it, or has no data."""
    x, weight = torch.randn(1, 5, 4), torch.randn(4, 3)
    with torch.no_grad():
        plain = causal_conv1d(x, weight, backend="numba")
        traced = torch.jit.trace(lambda x: causal_conv1d(x, weight, backend="numba"), x, check_trace=False)
        graph = make_fx(lambda x: causal_conv1d(x, weight, backend="numba"))(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert causal_conv1d(mode.from_tensor(x), weight, backend="numba").shape == plain.shape
        other = torch.randn(1, 5, 4)
        expected = causal_conv1d(other, weight, backend="numba")
    assert torch.equal(traced(other), expected)
    assert torch.equal(graph(other), expected)
    assert torch.equal(causal_conv1d(other, weight.requires_grad_(), backend="numba"), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("trained", [False, True])
def test_vmap(trained):
    x, weight = torch.randn(3, 5, 4), torch.randn(4, 3, requires_grad=trained)
    expected = torch.stack([causal_conv1d(row[None], weight, backend="numba") for row in x])
    assert torch.equal(torch.vmap(lambda row: causal_conv1d(row[None], weight, backend="numba"))(x), expected)
    expected = layer_norm(x, weight[:, 0], backend="numba")[0]
    assert torch.equal(torch.vmap(lambda row: layer_norm(row, weight[:, 0], backend="numba")[0])(x), expected)


@pytest.mark.parametrize("function", [causal_conv1d, layer_norm, selective_scan])
def test_where_autograd_alone_looks_on(function):
    """The gradients are those of the operator, to the bit, and it is not called."""
    x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    run = {
        causal_conv1d: lambda: causal_conv1d(x, weight, backend="numba"),
        layer_norm: lambda: layer_norm(x, weight[:, 0], weight[:, 1], residual=x, backend="numba"),
        selective_scan: lambda: selective_scan(x, x.sigmoid(), -weight.exp(), x[..., :3], x[..., 1:], backend="numba"),
    }[function]

    class Calls(TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            seen.append(str(called))
            return called(*args, **(kwargs or {}))

    results = {}
    for watcher in (nullcontext(), FlopCounterMode(display=False)):  # a tracer, which sees the operator
        seen: list[str] = []
        with watcher, Calls():
            outputs = run()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), (x, weight))
        results[any("polymamba" in call for call in seen)] = (*outputs, *gradients)
    for ours, theirs in zip(results[False], results[True], strict=True):
        assert torch.equal(ours, theirs)
