"""Codes in, logits out: labels, guidance, states on disk, the codec, the classifier."""

import numpy as np
import pytest
import torch

from polymamba.audio import AudioClassifier, AudioConfig, AudioModel, ClassifierConfig, Guided, UNetConfig
from polymamba.audio.codec import decode, encode, values
from polymamba.audio.config import START
from polymamba.core import collect, generate, load_state, prefill, save_state, select_state

TINY = UNetConfig(d_model=6, n_blocks=1, pool=(2, 3), d_state=3)


def model(**options) -> AudioModel:
    torch.manual_seed(0)
    model = AudioModel(AudioConfig(unet=TINY, **options)).eval()
    torch.nn.init.normal_(model.head.weight)  # sure of itself, so that a wrong context shows
    return model


@pytest.mark.parametrize("input", ["embedding", "float"])
@torch.no_grad()
def test_generation_is_reading_one_by_one(input):
    net = model(input=input)
    prompts = [torch.tensor([START, *range(n)]) for n in (5, 0, 11)]
    written = collect(generate(net, prompts, 30, seeds=[1, 2, 3]))
    for row, (prompt, codes) in enumerate(zip(prompts, written, strict=True)):
        assert codes == collect(generate(net, [prompt], 30, seeds=[row + 1]))[0]
        whole = torch.cat((prompt, torch.tensor(codes)))[None]
        again = collect(generate(net, [whole[0, :17]], 4, seeds=[7]))
        _, state = prefill(net, [whole[0, :16]], chunk=5)
        assert collect(generate(net, [whole[0, 16:17]], 4, seeds=[7], state=state)) == again


@torch.no_grad()
def test_a_state_on_disk(tmp_path):
    net = model(labels=("a", "b"))
    codes = torch.randint(256, (1, 9))
    _, state = net(codes, labels=torch.tensor([1]), return_state=True)
    save_state(tmp_path / "state", state)
    again = load_state(tmp_path / "state", net)
    assert torch.equal(again.label, torch.tensor([1]))
    for _ in range(8):
        assert torch.equal(net.step(codes[:, 0], again), net.step(codes[:, 0], state))


@torch.no_grad()
def test_labels_change_what_follows_and_stay_with_their_rows():
    net = model(labels=("a", "b"))
    codes = torch.randint(256, (1, 20)).repeat(3, 1)
    logits, state = net(codes[:, :7], labels=torch.tensor([0, 1, 2]), return_state=True)
    assert torch.equal(logits[2], net(codes[:1, :7])[0])  # 2: no label, as when none is given
    assert not torch.allclose(logits[0], logits[1])
    forked = select_state(state, [2, 1])
    rest = net(codes[:2, 7:], forked)
    torch.testing.assert_close(rest, net(codes[:2], labels=torch.tensor([2, 1]))[:, 7:], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="labels belong to a recording's begin"):
        net(codes, state, labels=torch.tensor([0, 1, 2]))


@torch.no_grad()
def test_guidance():
    net, codes = model(labels=("a", "b")), torch.randint(256, (1, 9))
    wanted, without = net(codes, labels=torch.tensor([1]))[0, -1], net(codes)[0, -1]
    for scale in (0.0, 1.0, 2.5):
        guided = Guided(net, scale)
        logits, state = prefill(guided, [codes[0, :8]], guided.init_state(1, torch.tensor([1])))
        logits = guided.step(codes[:, 8], state)
        torch.testing.assert_close(logits[0], without + scale * (wanted - without), rtol=0, atol=1e-4)


@pytest.mark.parametrize("codec", ["mu-law", "linear"])
def test_codec(codec):
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(encode(decode(codes, codec), codec), codes)
    wave = np.linspace(-1.2, 1.2, 999, dtype=np.float32)
    error = np.abs(decode(encode(wave, codec), codec) - wave.clip(-1, 1))
    assert error.max() < (0.023 if codec == "mu-law" else 0.004)
    assert encode(np.zeros(1), codec) == 128
    assert np.abs(decode(np.array([128]), codec)) < 0.004
    assert np.all(np.diff(values(codec)) > 0)


def test_mu_law_is_torchaudios():
    from torchaudio.functional import mu_law_decoding, mu_law_encoding

    wave = torch.linspace(-1, 1, 4001)
    assert np.array_equal(encode(wave.numpy(), "mu-law"), mu_law_encoding(wave, 256).numpy())
    torch.testing.assert_close(values("mu-law"), mu_law_decoding(torch.arange(256), 256), rtol=0, atol=1e-6)


@torch.no_grad()
def test_classifier_pads_without_a_trace(tmp_path):
    torch.manual_seed(0)
    config = ClassifierConfig(unet=TINY, labels=("a", "b", "c"))
    net = AudioClassifier(config).eval()
    codes, lengths = torch.randint(256, (3, 20)), (20, 7, 1)
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    logits = net(codes.masked_fill(~mask, 0), mask)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row], net(codes[row : row + 1, :length])[0], rtol=0, atol=1e-5)
    net.save_pretrained(tmp_path)
    assert torch.equal(AudioClassifier.from_pretrained(tmp_path)(codes, mask), net(codes, mask))
    with pytest.raises(ValueError, match="a classifier needs at least two"):
        ClassifierConfig(unet=TINY, labels=("a",))


@torch.no_grad()
def test_round_trip(tmp_path):
    net, codes = model(labels=("a", "b"), sample_rate=8000, codec="linear"), torch.randint(256, (1, 9))
    net.save_pretrained(tmp_path)
    again = AudioModel.from_pretrained(tmp_path)
    assert again.config == net.config
    assert torch.equal(again(codes), net(codes))


@pytest.mark.gpu
@torch.no_grad()
def test_cores_generation_on_a_gpu():
    net = model().cuda()
    codes = collect(generate(net, [torch.tensor([START])], 30, seeds=[1]))
    assert len(codes[0]) == 30


@torch.no_grad()
def test_pools_under_autocast_have_the_weights_dtype():
    net, codes = model(), torch.randint(256, (1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        _, state = net(codes, return_state=True)
    assert {s.dtype for s in (*state.unet.pending, *state.unet.queue)} == {torch.float32}


@pytest.mark.parametrize("input", ["embedding", "float"])
@torch.no_grad()
def test_weights_in_bf16(input):
    """Forward and steps, near the same weights in float32."""
    net, codes = model(input=input, labels=("a", "b")).bfloat16(), torch.randint(256, (3, 20))
    state = net.init_state(3)
    steps = torch.stack([net.step(codes[:, t], state) for t in range(20)], 1)
    half = net(codes)
    exact = net.float()(codes)
    assert half.dtype == steps.dtype == torch.bfloat16
    for logits in (half, steps):
        assert (logits - exact).abs().max() < 0.02 * exact.abs().max()
