"""The CUDA kernels of a step of Mamba blocks, emulated on the CPU: against float64, one block after another."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from polymamba.kernels import (
    Journal,
    causal_conv1d_step,
    mamba_stack_step,
    mamba_step,
    nvrtc,
    selective_scan_step,
)
from polymamba.kernels.mamba_step import MambaWeights, cuda, cuda_halves, cuda_middle, cuda_wide, mamba_step_reference

CASES = {  # rows, width, inner width, rank, taps
    "few": (3, 256, 512, 48, 4),
    "many": (11, 512, 256, 16, 3),
    "tiles": (41, 256, 256, 16, 2),
    "two groups": (75, 256, 256, 16, 4),
    "two of 128": (200, 256, 256, 16, 3),
}


@pytest.fixture
def on_the_cpu(monkeypatch, emulated):
    """A GPU of five multiprocessors."""
    monkeypatch.setattr(nvrtc, "EMULATED", True)
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, device: emulated(source, name))
    monkeypatch.setattr(nvrtc, "processors", lambda device: 5)
    monkeypatch.setattr(cuda_middle, "CLUSTER", 2)
    made = (
        cuda._few,
        cuda._many,
        cuda._wide,
        cuda_middle._kernel,
        cuda_middle._with_all_at_once,
        cuda_halves._kernels,
        cuda_wide._kernels,
    )
    for function in made:
        function.cache_clear()
    yield
    for function in made:
        function.cache_clear()


def problem(rows, width, inner, rank, taps, n_layers=2, centred=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    weights = [
        MambaWeights(
            norm=1 + normal(width, scale=0.1),
            norm_bias=normal(width) if centred else None,
            in_proj=normal(2 * inner, width, scale=width**-0.5),
            conv=normal(inner, taps, scale=0.5),
            conv_bias=normal(inner) if i else None,
            x_proj=normal(rank + 32, inner, scale=inner**-0.5),
            dt_proj=normal(inner, rank, scale=rank**-0.5),
            dt_bias=normal(inner) - 4,
            A_log=(torch.rand(inner, 16, generator=generator) * 3).bfloat16(),
            D=normal(inner),
            out_proj=normal(width, inner, scale=inner**-0.5),
        )
        for i in range(n_layers)
    ]
    states = [(normal(rows, inner, taps - 1), normal(rows, inner, 16).float()) for _ in weights]
    return normal(rows, width), states, weights


def one_by_one(x, states, weights):
    """The stream after the blocks, in float64; states are updated."""
    x, stream = x.double(), None
    for w, (conv, ssm) in zip(weights, states, strict=True):
        w = MambaWeights(*(None if t is None else t.double() for t in w))
        x, stream = mamba_step_reference(x, stream, conv, ssm, w, 1e-5, w.norm_bias is not None)
    return stream + x


def named(stream, states):
    found = {f"{name} {i}": s for i, state in enumerate(states) for name, s in zip(("conv", "ssm"), state, strict=True)}
    return {"stream": stream.float(), **found}


def steps(x, states, weights, n=2, of=cuda):
    """Of several, so that what one leaves in the states is read; with a copy of the states, which is changed."""
    states = [tuple(t.clone() for t in state) for state in states]
    for _ in range(n):
        stream = of.step(x, states, weights, 1e-5, weights[0].norm_bias is not None)
        assert stream is not None
    return named(stream, states)


def steps_of_float64(x, states, weights, n=2):
    states = [tuple(t.double() for t in state) for state in states]
    for _ in range(n):
        stream = one_by_one(x, states, weights)
    return named(stream, states)


@pytest.fixture
def all_are_wide(monkeypatch):
    """Also the narrow blocks of these tests."""
    monkeypatch.setattr(cuda_middle, "WIDEST", 0)
    monkeypatch.setattr(cuda, "WIDEST", 0)
    monkeypatch.setattr(cuda_wide, "STAGES", (3, 3))
    monkeypatch.setattr(cuda, "STAGES_OF_WIDE", 3)


@pytest.mark.parametrize("case", CASES)
def test_stack(case, on_the_cpu, assert_close):
    given = problem(*CASES[case])
    assert_close(steps(*given), steps_of_float64(*given), 1e-2, case)


@pytest.mark.parametrize("of", [cuda, cuda_wide])
def test_from_an_embedding(of, on_the_cpu, request):
    """Of which rows are read in place: to the bit what the stack makes of them otherwise."""
    if of is cuda_wide:
        request.getfixturevalue("all_are_wide")
    table, states, weights = problem(5, 256, 256, 16, 2, n_layers=1)
    rows = torch.tensor([4, 0, 4, 2, 1])
    copies = [[tuple(t.clone() for t in state) for state in states] for _ in range(2)]
    plain = of.step(table[rows], copies[0], weights, 1e-5, False)
    assert of.step(table, copies[1], weights, 1e-5, False, rows).equal(plain)


def test_what_the_stack_does_not_serve(on_the_cpu):
    x, states, weights = problem(*CASES["few"])
    assert cuda.serves(x, states, weights, False)
    assert not cuda.serves(x, states, weights, True)  # a LayerNorm
    assert not cuda.serves(x[:2], [(c[:2], s[:2]) for c, s in states], weights, False)  # for those Triton is faster
    assert not cuda.serves(*problem(cuda.TILES + 1, *CASES["few"][1:]), False)
    assert not cuda.serves(*problem(*CASES["few"][:4], 9), False)  # taps
    assert not cuda.serves(x, [(c, s.bfloat16()) for c, s in states], weights, False)
    assert not cuda.serves(x, states, [weights[0], weights[1]._replace(D=weights[1].D.float())], False)


WIDE = {  # the module, rows, width, inner width, rank, taps, LayerNorm
    "RMSNorm": (cuda_wide, (5, 512, 256, 16, 4), False),
    "LayerNorm": (cuda_wide, (35, 256, 512, 48, 2), True),
    "pairs": (cuda, (45, 256, 1024, 16, 3), False),
}


@pytest.mark.parametrize("case", WIDE)
def test_wide_stack(case, on_the_cpu, all_are_wide, assert_close):
    of, sizes, centred = WIDE[case]
    given = problem(*sizes, centred=centred)
    assert_close(steps(*given, of=of), steps_of_float64(*given), 1e-2, case)


def test_the_widest(on_the_cpu, all_are_wide):
    for width, served in ((512, True), (cuda_wide.WIDEST + 256, False)):
        assert cuda_wide.serves(*problem(5, width, 256, 16, 4, n_layers=1)) is served


def test_which_wide_blocks_are_by_pairs(on_the_cpu, all_are_wide):
    sizes = WIDE["pairs"][1][1:]
    assert cuda.serves(*problem(cuda.TILED, *sizes), False)
    assert not cuda.serves(*problem(cuda.TILED - 1, *sizes), False)
    assert not cuda.serves(*problem(cuda.BANDS + 1, *sizes), False)
    assert not cuda.serves(*problem(cuda.TILED, *sizes, centred=True), True)


MIDDLES = {  # rows, sequences of a cluster, inner width, rank, taps
    "one each": (3, 1, 256, 16, 4),
    "some": (5, 3, 128, 48, 2),
    "many": (18, 17, 512, 16, 3),
}


def two_steps_between(of, rows, inner, rank, taps, assert_close):
    """Two steps of what lies between the projections, against single operators in float64."""
    x, [state], [w] = problem(rows, 256, inner, rank, taps, n_layers=1)
    uz = torch.randn(2, rows, 2 * inner, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert of.serves(x, *state, w)
    actual, expected = [t.clone() for t in state], [t.double() for t in state]
    wide = MambaWeights(*(None if t is None else t.double() for t in w))
    for each in uz:
        y = of.step(each, *actual, w)
        u, z = each.double().chunk(2, dim=1)
        u = causal_conv1d_step(expected[0], u, wide.conv, wide.conv_bias)
        dt, B, C = (u @ wide.x_proj.T).split([rank, 16, 16], dim=1)
        scan = expected[1], u, dt @ wide.dt_proj.T, -wide.A_log.exp(), B[:, None], C[:, None], wide.D, z
        wanted = selective_scan_step(*scan, delta_bias=wide.dt_bias, delta_softplus=True)
    names = "y", "conv", "ssm"
    assert_close(dict(zip(names, (y, *actual), strict=True)), dict(zip(names, (wanted, *expected), strict=True)), 1e-2)


@pytest.mark.parametrize("case", MIDDLES)
def test_middle(case, on_the_cpu, monkeypatch, assert_close):
    rows, at_once, *sizes = MIDDLES[case]
    monkeypatch.setattr(cuda_middle, "kernel_for", lambda *_: cuda_middle._kernel(*sizes, at_once, False, -1))
    two_steps_between(cuda_middle, rows, *sizes, assert_close)


HALVES = {  # rows, inner width, rank, taps
    "one cluster": (3, 256, 16, 4),
    "clusters": (9, 1024, 48, 3),
    "more than wait at once": (70, 512, 16, 2),
    "several sums": (9, 768, 32, 4),
    "fewer channels": (13, 256, 160, 4),
    "fewer channels, more sequences": (41, 256, 48, 2),
}


@pytest.mark.parametrize("case", HALVES)
def test_halves(case, on_the_cpu, monkeypatch, assert_close):
    monkeypatch.setattr(cuda_middle, "WIDEST", 0)
    two_steps_between(cuda_halves, *HALVES[case], assert_close)


JOURNALED = {  # rows, width, inner width, rank, taps, blocks, LayerNorm
    "more than wait at once": (21, 256, 256, 48, 2, 1, True),
    "seven slots": (3, 256, 256, 160, 4, 2, False),
}


@pytest.mark.parametrize("case", JOURNALED)
def test_with_a_journal(case, on_the_cpu, all_are_wide, monkeypatch):
    """Two periods: to the bit what is without one; in between the states in memory stay as they were."""
    monkeypatch.setattr(cuda_halves, "FEWEST_IN_JOURNAL", 3)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 2)
    *sizes, centred = JOURNALED[case]
    x, states, weights = problem(*sizes, centred)
    xs = [x, x.flip(0), -x] * 2
    plain, kept = ([tuple(t.clone() for t in state) for state in states] for _ in range(2))
    expected = [cuda_wide.step(x, plain, weights, 1e-5, centred) for x in xs]
    journal, before, actual = Journal(), [ssm.clone() for _, ssm in kept], []

    def step():
        actual.append(cuda_wide.step(xs[len(actual)], kept, weights, 1e-5, centred))
        unwritten = [torch.equal(old, ssm) for old, (_, ssm) in zip(before, kept, strict=True)]
        assert unwritten == [len(actual) % Journal.PERIOD != 0] * len(kept)

    for _ in range(len(xs) // Journal.PERIOD):
        assert journal.run(step) == Journal.PERIOD
        before = [ssm.clone() for _, ssm in kept]
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert all(torch.equal(*pair) for two in zip(kept, plain, strict=True) for pair in zip(*two, strict=True))


@pytest.mark.parametrize(("rows", "at_once"), [(3, 1), (16, 2), (64, 5), (256, 18), (1000, 20)])
def test_all_clusters_run_at_once(rows, at_once, monkeypatch):
    """Where the device says that it takes 15."""
    monkeypatch.setattr(
        cuda_middle, "_kernel", lambda E, R, W, n, passing, device: SimpleNamespace(at_once=n, clusters=15)
    )
    assert cuda_middle._with_all_at_once.__wrapped__(rows, 1536, 48, 4, 0).at_once == at_once


def both_steps(x, state, w, backend=None):
    """Two steps of one block: what it makes, and its states."""
    state = [t.clone() for t in state]
    for _ in range(2):
        out, stream = mamba_step(x, None, *state, w, backend=backend)
    return {"out": out, "stream": stream, "conv": state[0], "ssm": state[1]}


def test_between_products(on_the_cpu, monkeypatch, device_of, assert_close):
    """A step of many sequences, the rest of it in Triton."""
    device_of("triton")
    monkeypatch.setattr(import_module("polymamba.kernels.mamba_step.triton"), "FEW", 0)
    x, [state], [w] = problem(3, 48, 128, 16, 4, n_layers=1)
    taken, step = [], cuda_middle.step
    monkeypatch.setattr(cuda_middle, "step", lambda *given: taken.append(1) or step(*given))
    wide = MambaWeights(*(None if t is None else t.double() for t in w))
    expected = both_steps(x.double(), [t.double() for t in state], wide, "reference")
    assert_close(both_steps(x, state, w, "triton"), expected, 1e-2)
    assert len(taken) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(65, 768), (256, 768), (301, 768), (70, 2048), (256, 2048)])
def test_many_at_size(rows, width, assert_close):
    """Against float64, and twice to the bit the same."""
    x, [state], [w] = problem(rows, width, 2 * width, width // 16, 4, n_layers=1)
    wide = MambaWeights(*(None if t is None else t.double() for t in w))
    expected = both_steps(x.double(), [t.double() for t in state], wide, "reference")
    w, x, state = MambaWeights(*(None if t is None else t.cuda() for t in w)), x.cuda(), [t.cuda() for t in state]
    first, again = both_steps(x, state, w), both_steps(x, state, w)
    assert_close({name: t.cpu() for name, t in first.items()}, expected, 2e-2)
    assert all(torch.equal(t, again[name]) for name, t in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "width"),
    [
        *((3, 768), (13, 768), (64, 768), (100, 768), (256, 768), (40, 1024), (100, 1024), (13, 1792), (64, 1792)),
        *((13, 2048), (40, 2048), (41, 2048), (64, 2048), (50, 2560)),
    ],
)
def test_at_size(rows, width, assert_close):
    """Against float64; twice to the bit the same, and as the last sequences alone, as few as the same kernels serve."""
    centred = width == 1792  # that of MambaByte-972M
    of = cuda if width <= cuda.WIDEST or (rows >= cuda.TILED and not centred) else cuda_wide
    kinds = (cuda.BANDS + 1, cuda.TILED, 3) if of is cuda else (3,)
    few = next(fewest for fewest in kinds if rows >= fewest)
    given = problem(rows, width, 2 * width, width // 16, 4, centred=centred)
    expected = steps_of_float64(*given)
    x, states, weights = given
    weights = [MambaWeights(*(None if t is None else t.cuda() for t in w)) for w in weights]
    x, states = x.cuda(), [tuple(t.cuda() for t in state) for state in states]
    first, again = steps(x, states, weights, of=of), steps(x, states, weights, of=of)
    assert_close({name: t.cpu() for name, t in first.items()}, expected, 2e-2)
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    alone = steps(x[-few:], [tuple(t[-few:] for t in state) for state in states], weights, of=of)
    assert all(torch.equal(t, first[name][-few:]) for name, t in alone.items())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "width"),
    [(16, 2048), (50, 2048), (64, 2048), (200, 2048), (256, 2048), (64, 1792), (29, 2560), (256, 2560)],
)
def test_with_a_journal_at_size(rows, width):
    """Two blocks, two periods: to the bit what is without one."""
    centred = width == 1792
    x, states, weights = problem(rows, width, 2 * width, width // 16, 4, centred=centred)
    weights = [MambaWeights(*(None if t is None else t.cuda() for t in w)) for w in weights]
    plain, kept = ([tuple(t.cuda() for t in state) for state in states] for _ in range(2))
    xs, journal, actual = [x.cuda(), x.flip(0).cuda(), -x.cuda()] * 2, Journal(), []

    def step(x, states):
        stream = mamba_stack_step(x, states, weights)
        if stream is not None:
            return stream
        for state, w in zip(states, weights, strict=True):
            x, stream = mamba_step(x, stream, *state, w, centred=centred)
        return stream + x

    expected = [step(x, plain) for x in xs]
    for _ in range(len(xs) // Journal.PERIOD):
        assert journal.run(lambda: actual.append(step(xs[len(actual)], kept))) == Journal.PERIOD
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert all(torch.equal(*pair) for two in zip(kept, plain, strict=True) for pair in zip(*two, strict=True))
