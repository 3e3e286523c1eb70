"""Writing on: the writers against the model and each other, restarts, the watchdog, guidance; on a GPU, too."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from polymamba.audio import AudioConfig, AudioModel, Guided, UNetConfig
from polymamba.audio.codec import encode
from polymamba.audio.config import START
from polymamba.audio.fused import can_fuse
from polymamba.audio.fused_kernel import _choose
from polymamba.audio.generation import Watchdog, begin, write_on
from polymamba.audio.writers import CudaWriter, EagerWriter, FusedWriter, GraphWriter, writer_of
from polymamba.core import InputError, SamplingConfig
from polymamba.core.sampling import choose
from polymamba.kernels import nvrtc

SHAPES = {
    "unet": {"pool": (2, 4), "n_blocks": 2},
    "sashimi": {"pool": (3,), "layout": "sashimi", "norm": "layer", "d_conv": 1},
    "pairs": {"pool": (2, 2), "stages": ("mamba+mlp",)},
    "flat": {"pool": (), "n_blocks": 2},
}


def model_of(shape: str, **options) -> AudioModel:
    torch.manual_seed(0)
    unet = UNetConfig(**{"d_model": 16, "n_blocks": 1, "d_state": 5, **SHAPES[shape]})
    model = AudioModel(AudioConfig(unet=unet, labels=("a", "b"), **options)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def states_of(model, rows: int = 2, n_read: int = 13):
    device = model.head.weight.device
    prompt = torch.randint(256, (rows, n_read), generator=torch.Generator().manual_seed(3)).to(device)
    prompt[:, 0] = START
    with torch.no_grad():
        _, state = model(prompt[:, :-1], labels=torch.arange(1, rows + 1, device=device) % 3, return_state=True)
    return state, prompt[:, -1]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def close(a, b, tolerance=2e-5):
    for ours, theirs in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if theirs.numel():
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


def round_matrices(model):
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("_proj.weight", "pools", "head.weight")) and "bias" not in name:
            parameter.data = parameter.data.bfloat16().float()


@pytest.mark.parametrize("input", ["embedding", "float"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_compiled_loop_is_the_model(shape, input):
    """Its logits, and the state that it leaves, against the model that reads what it wrote."""
    model = model_of(shape, input=input)
    assert can_fuse(model)
    state, unread = states_of(model)
    writer = writer_of(model, state, unread, SamplingConfig(), [1, 2])
    assert isinstance(writer, FusedWriter)
    seen = torch.zeros(2, 29, 256)
    codes = torch.from_numpy(writer.write(29, seen))
    logits, after = model(torch.cat((unread[:, None], codes[:, :-1]), 1), state, return_state=True)
    assert (seen - logits).abs().max() < 2e-5 * logits.abs().max()
    close(writer.state, after)
    assert torch.equal(writer.unread, codes[:, -1])
    more = writer.write(7)
    again = writer_of(model, after, codes[:, -1], SamplingConfig(), [1, 2])
    again.generators[0].set_state(writer.generators[0].get_state())
    assert more.shape == again.write(7).shape


@pytest.mark.parametrize("shape", ["unet", "pairs"])
@torch.no_grad()
def test_bf16_rounds_the_matrices_and_nothing_else(shape):
    model = model_of(shape)
    state, unread = states_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        writer = writer_of(model, state, unread, SamplingConfig(), [1, 2])
    assert isinstance(writer, FusedWriter)
    round_matrices(model)
    seen = torch.zeros(2, 29, 256)
    codes = torch.from_numpy(writer.write(29, seen))
    logits = model(torch.cat((unread[:, None], codes[:, :-1]), 1), state)
    assert (seen - logits).abs().max() < 2e-5 * logits.abs().max()


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(top_p=0.9), SamplingConfig(temperature=0.0)])
@torch.no_grad()
def test_writers_agree_and_rows_are_alone(config):
    model = model_of("unet")
    state, unread = states_of(model)
    codes = {}
    for kind in (FusedWriter, EagerWriter):
        for rows in ([0, 1], [1]):
            part = pytree.tree_map(lambda s, rows=rows: s[rows].clone(), state)
            writer = kind(model, part, unread[rows], config, generators(*(7 + r for r in rows)))
            codes[kind, len(rows)] = np.concatenate((writer.write(3), writer.write(37)), 1)
    for a, b in itertools.combinations(codes.values(), 2):
        assert np.array_equal(a[-1], b[-1])


@torch.no_grad()
def test_choice_is_cores():
    rng = np.random.default_rng(0)
    settings = itertools.product((1.0, 0.7), (0, 1, 5), (1.0, 0.9, 0.3), (0.0, 0.1))
    logits = (3 * rng.standard_normal((40, 256))).astype(np.float32)
    logits[:5] = 0.0  # all equal
    uniform = rng.random(40)
    for temperature, top_k, top_p, min_p in [*settings, (0.0, 0, 1.0, 0.0)]:
        config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        theirs, _ = choose(torch.from_numpy(logits), config, None, torch.from_numpy(uniform))
        p = np.empty(256, np.float32)
        ours = [_choose(row, temperature, top_k, top_p, min_p, u, p) for row, u in zip(logits, uniform, strict=True)]
        assert ours == theirs.tolist(), config
    assert _choose(np.full(256, np.nan, np.float32), 1.0, 0, 1.0, 0.0, 0.5, p) == -1
    assert {_choose(logits[7], 1.0, 0, 1.0, 0.0, u, p) for u in (0.0, np.nextafter(1.0, 0))} <= set(range(256))


@pytest.mark.parametrize("kind", [FusedWriter, EagerWriter])
@torch.no_grad()
def test_snapshots(kind):
    model = model_of("unet")
    state, unread = states_of(model)
    writer = kind(
        model,
        pytree.tree_map(torch.clone, state),
        unread,
        SamplingConfig(),
        [torch.Generator().manual_seed(s) for s in (1, 2)],
    )
    writer.write(5)
    before = writer.snapshot()
    first = writer.write(11)
    writer.restore(before, np.array([True, True]))
    assert np.array_equal(writer.write(11), first)
    after = writer.snapshot()
    writer.restore(before, np.array([True, False]), draw_anew=True)
    other = writer.write(11)
    assert not np.array_equal(other[0], first[0])
    writer.restore(after, np.array([False, True]))
    writer.restore(before, np.array([True, False]))
    again = writer.write(11)
    assert np.array_equal(again[0], first[0])
    assert not np.array_equal(again[1], first[1])


@torch.no_grad()
def test_guidance_in_the_loop():
    model = model_of("unet")
    begun = begin(Guided(model, 2.0), np.arange(9, dtype=np.uint8), 1)
    state, unread = begun.state, begun.unread
    fused = writer_of(Guided(model, 2.0), state, unread, SamplingConfig(), [5])
    assert isinstance(fused, FusedWriter)
    eager = EagerWriter(
        Guided(model, 2.0),
        pytree.tree_map(torch.clone, state),
        unread,
        SamplingConfig(),
        [torch.Generator().manual_seed(5)],
    )
    assert np.array_equal(fused.write(30), eager.write(30))
    close(fused.state, eager.state, 1e-4)


def test_what_cannot_be_compiled_is_written_all_the_same():
    model = model_of("unet")
    state, unread = states_of(model)
    assert not can_fuse(model.double())
    assert isinstance(
        writer_of(model.float(), state, unread, SamplingConfig(repetition_penalty=1.1), [1, 2]), EagerWriter
    )
    other = AudioModel(AudioConfig(unet=UNetConfig(d_model=8, n_blocks=1, pool=(2,), stages=("s4d", "s4")))).eval()
    assert not can_fuse(other)
    codes = np.concatenate([c for c, _ in write_on(other, begin(other), 20, SamplingConfig(), [1], block=8)], 1)
    assert codes.shape == (1, 20)


@torch.no_grad()
def test_pieces_of_any_size_are_one(model):
    whole = np.concatenate([c for c, _ in write_on(model, begin(model), 50, SamplingConfig(), [1, 2], block=50)], 1)
    pieces = np.concatenate([c for c, _ in write_on(model, begin(model), 50, SamplingConfig(), [1, 2], block=7)], 1)
    assert np.array_equal(whole, pieces)
    alone = np.concatenate([c for c, _ in write_on(model, begin(model), 50, SamplingConfig(), [2], block=9)], 1)
    assert np.array_equal(whole[1:], alone)


class Loud(Watchdog):
    """Calls noise what the test wants."""

    def __init__(self, config, answers):
        super().__init__(config)
        self.answers = iter(answers)

    def is_noise(self, codes):
        return next(self.answers, np.zeros(len(codes), bool))


def test_the_watchdog_has_rows_written_again_and_leaves_the_others(model):
    def run(answers):
        watchdog = Loud(model.config, [np.array(a) for a in answers])
        steps = write_on(model, begin(model), 40, SamplingConfig(), [1, 2], block=10, watchdog=watchdog)
        return np.concatenate([c for c, _ in steps], 1), watchdog.n_again

    calm, none = run([])
    once, one = run([[False, False], [True, False], [False, False]])
    assert (none, one) == (0, 1)
    assert np.array_equal(once[1], calm[1])
    assert np.array_equal(once[0, :10], calm[0, :10])
    assert not np.array_equal(once[0, 10:20], calm[0, 10:20])
    stuck, n = run([[False, False]] + [[False, True]] * 3)
    assert n == 3
    assert np.array_equal(stuck[0], calm[0])


def test_what_is_noise():
    config = AudioConfig(unet=UNetConfig(d_model=8, n_blocks=1), loudest=0.2)
    wave = np.random.default_rng(0).standard_normal((2, 4000)) * np.array([[0.2], [0.5]])
    assert Watchdog(config).is_noise(encode(wave, "mu-law")).tolist() == [False, True]


def test_no_numbers(model):
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(InputError, match="the model's predictions are not finite"):
        next(iter(write_on(model, begin(model), 5, SamplingConfig(), [1], block=5)))


ON_A_GPU = [
    *itertools.product((CudaWriter, GraphWriter), (torch.float32,), SHAPES, (False, True)),
    (GraphWriter, torch.bfloat16, "unet", False),
    (GraphWriter, torch.bfloat16, "pairs", True),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "weights", "shape", "guided"), ON_A_GPU)
@torch.no_grad()
def test_on_a_gpu(kind, weights, shape, guided):
    """The codes and states of plain stepping, in whole periods and parts of them, and again from where they stood."""
    model = model_of(shape).to("cuda", weights)
    assert can_fuse(model) == (weights == torch.float32)
    mixed = Guided(model, 1.5) if guided else model
    begun = begin(mixed, np.arange(9, dtype=np.uint8), 1)
    state = pytree.tree_map(lambda s: s.repeat_interleave(3, 0), begun.state)
    arguments = (begun.unread.repeat(3), SamplingConfig(top_p=0.95))
    ours = kind(mixed, pytree.tree_map(torch.clone, state), *arguments, generators(1, 2, 3))
    eager = EagerWriter(mixed, state, *arguments, generators(1, 2, 3))
    for n in (3, 40, 17):
        before = ours.snapshot()
        codes = ours.write(n)
        assert np.array_equal(codes, eager.write(n))
        ours.restore(before, np.ones(3, bool))
        assert np.array_equal(ours.write(n), codes)
    close(ours.state, eager.state, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_more_recordings_than_multiprocessors(bf16, monkeypatch):
    """In several launches, to the bit what three of them are alone and in one launch; and the model's own logits."""
    from polymamba.audio import fused_cuda

    model = model_of("pairs").cuda()
    n = nvrtc.processors(torch.cuda.current_device()) + 3
    state, unread = states_of(model, n)

    def written(rows, at_a_time):
        monkeypatch.setattr(fused_cuda, "AT_A_TIME", at_a_time)
        part = pytree.tree_map(lambda s: s[rows], state)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            writer = CudaWriter(model, part, unread[rows], SamplingConfig(), generators(*rows))
        seen = torch.zeros(len(rows), 29, 256, device="cuda")
        return writer, torch.from_numpy(writer.write(29, seen)).cuda(), seen

    few = [0, n // 2, n - 1]
    many, codes, seen = written(list(range(n)), 8)
    alone, again, seen_alone = written(few, 2048)
    assert (many.fused.threads, alone.fused.threads) == (fused_cuda.MANY[0], fused_cuda.FEW[0])
    pairs = ((codes, again), (seen, seen_alone), *zip(many.values, alone.values, strict=True))
    assert all(torch.equal(ours[few], theirs) for ours, theirs in pairs)
    if bf16:
        round_matrices(model)
    logits, after = model(torch.cat((unread[:, None], codes[:, :-1]), 1), state, return_state=True)
    close(seen, logits, 1e-4)
    close(many.state, after, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("missing", ["_nvrtc", "kernel"])  # the library; machine code for this source
@torch.no_grad()
def test_a_gpu_without_nvrtc(missing, monkeypatch):
    """The graph's writer, a warning that says why, and the same recordings."""
    from polymamba.kernels.selective_scan import cuda

    model = model_of("unet").cuda()
    arguments = (model, *states_of(model), SamplingConfig(), [1, 2])
    usual = writer_of(*arguments)
    assert type(usual) is CudaWriter

    def refuse(*_):
        raise nvrtc.Unavailable("it is not there")

    monkeypatch.setattr(nvrtc, missing, refuse)
    monkeypatch.setattr(cuda, "_capable", cuda._capable.__wrapped__)  # it remembers its answer
    with pytest.warns(RuntimeWarning, match="written by CUDA graphs, which is slower"):
        other = writer_of(*arguments)
    assert type(other) is GraphWriter
    assert np.array_equal(other.write(29), usual.write(29))
