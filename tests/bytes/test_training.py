"""Windows of training: a pure function of (seed, epoch), that covers the stream; and what is learnt from them."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from polymamba.bytes import ByteLM
from polymamba.bytes.config import DOCUMENT
from polymamba.bytes.evaluation import score
from polymamba.bytes.training import PADDING, TrainBytes, next_byte_loss
from polymamba.core import BackboneConfig, InputError, LanguageModelConfig, MoEConfig, TrainConfig
from polymamba.core.batching import pad_right
from polymamba.core.parallel import context_parallel


def task(documents, context=16, seed=0, windows="packed", **options) -> TrainBytes:
    return TrainBytes(documents, documents, TrainConfig(**{"batch_size": 5, **options}), context, seed, windows)


@pytest.mark.parametrize("context", [1, 7, 16, 100])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_reads_the_stream_once(documents, context, epoch):
    work = task(documents, context)
    ids = torch.cat([work.batch(windows, epoch) for windows in work.plan(epoch)])
    starts, _, marked = np.concatenate(work.plan(epoch)).T
    stream = documents.read(0, documents.n_tokens)
    for start, has_mark, window in zip(starts, marked, ids, strict=True):
        first = DOCUMENT if has_mark else stream[start]
        assert window.tolist() == [first, *stream[start + 1 : start + context + 1]]
    predicted = np.sort(np.concatenate([np.arange(start + 1, start + context + 1) for start in starts]))
    assert np.array_equal(predicted, np.arange(predicted[0], predicted[-1] + 1))  # each once, without a gap
    assert predicted[0] - 1 < context
    assert documents.n_tokens - 1 - predicted[-1] < context


@pytest.mark.parametrize("context", [1, 7, 16, 300])
@pytest.mark.parametrize("epoch", [0, 3])
def test_apart_no_window_holds_two_documents(documents, context, epoch):
    """Every byte and every end is predicted once, from what stands before it in its document's window."""
    work = task(documents, context, windows="apart")
    stream, predicted = documents.read(0, documents.n_tokens).tolist(), []
    for description in work.plan(epoch):
        ids = work.batch(description, epoch)
        assert ids.shape == (len(description), 1 + description[:, 1].max())
        for (start, size, has_mark), window in zip(description.tolist(), ids.tolist(), strict=True):
            assert 0 < size <= context
            assert window[: size + 1] == [
                DOCUMENT if has_mark else stream[start],
                *stream[start + 1 : start + size + 1],
            ]
            assert set(window[size + 1 :]) <= {PADDING}
            assert DOCUMENT not in stream[start + 1 : start + size]
            predicted += range(start + 1, start + size + 1)
    assert sorted(predicted) == list(range(1, documents.n_tokens))


def test_apart_windows_move(documents):
    def starts(epoch):
        return {start for start, _, _ in np.concatenate(task(documents, windows="apart").plan(epoch)).tolist()}

    assert starts(0) != starts(1)
    assert starts(0) == starts(0)


def test_windows_of_like_length_stand_together(as_documents, tmp_path):
    documents = as_documents(tmp_path / "d", [bytes(1 + i % 90) for i in range(400)])
    plan = task(documents, context=64, windows="apart").plan(0)
    n_padded = sum(len(batch) * batch[:, 1].max() - batch[:, 1].sum() for batch in plan)
    assert n_padded < 0.1 * documents.n_tokens


@pytest.mark.parametrize("n_documents", [1, 7, 60])
def test_few_documents_begin_anywhere(as_documents, tmp_path, n_documents):
    """Of a thousand windows a twentieth has a mark, others each epoch; many documents have marks enough themselves."""
    documents = as_documents(tmp_path / "d", [bytes(16_000 // n_documents)] * n_documents)
    marked = [
        {start for start, _, has_mark in np.concatenate(task(documents).plan(epoch)) if has_mark} for epoch in (0, 1)
    ]
    for starts in marked:
        assert len(starts) == max(0, 50 - n_documents)
    assert n_documents == 60 or marked[0] != marked[1]


def test_the_plan_depends_on_seed_and_epoch_alone(documents):
    def plan(seed, epoch):
        return [windows.tolist() for windows in task(documents, seed=seed).plan(epoch)]

    assert plan(1, 2) == plan(1, 2)
    assert len({str(plan(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    n_windows = sum(map(len, plan(0, 0)))
    assert sorted(map(len, plan(0, 0)), reverse=True) == [5] * (n_windows // 5) + [n_windows % 5] * (n_windows % 5 > 0)
    assert max(map(len, task(documents, max_tokens=48).plan(0))) == 3


def test_a_corpus_shorter_than_a_window(documents):
    work = task(documents, context=100_000)
    (windows,) = work.plan(0)
    assert windows.tolist() == [[0, documents.n_tokens - 1, 0]]
    assert work.batch(windows, 0)[0].tolist() == documents.read(0, documents.n_tokens).tolist()


def test_loss_is_the_mean_over_all_targets(model, documents):
    work = task(documents, context=documents.n_tokens - 1)
    (windows,) = work.plan(0)
    batch = work.batch(windows, 0)
    log_p = model(batch[:, :-1]).double().log_softmax(-1)[0]
    expected = -sum(log_p[i, batch[0, i + 1]].item() for i in range(len(log_p))) / len(log_p)
    assert work.loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_padding_costs_nothing(model, documents):
    ids = torch.from_numpy(documents.read(3, 20))[None]
    padded = torch.cat((ids, torch.full((1, 9), PADDING)), 1)
    assert next_byte_loss(model, padded).item() == pytest.approx(next_byte_loss(model, ids).item(), rel=1e-6)


def test_no_validation_figure_of_a_model_that_sees_the_future(model, documents):
    class Leaky(type(model)):
        def forward(self, tokens, *args, **options):
            logits = super().forward(tokens, *args, **options)
            return logits + torch.roll(tokens, -1, 1)[..., None] if torch.is_tensor(logits) else logits

    model.__class__ = Leaky
    with pytest.raises(InputError, match="sees the future"):
        task(documents).evaluate(model)


@pytest.mark.parametrize("windows", ["packed", "apart"])
def test_learns(model, documents, windows):
    work = task(documents, context=64, windows=windows)
    before = work.evaluate(model.eval())["valid_bits_per_byte"]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-2)
    for epoch in range(25):
        for batch in work.plan(epoch):
            work.loss(model, work.batch(batch, epoch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    figures = work.evaluate(model.eval())
    assert before > 7
    assert figures["valid_bits_per_byte"] < 2
    assert work.score(figures) == -score(model, documents).bits_per_byte


def cut_losses():
    """Of windows of unlike lengths: (the loss, what the processes have of it together)."""
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=8, n_layer=2, d_state=2, pattern=("mamba", "moe"), moe=MoEConfig(n_experts=2))
    model = ByteLM(LanguageModelConfig(backbone=backbone, vocab_size=320))
    pairs = []
    for lengths in ([41, 41], [42, 12]):
        ids = pad_right([np.arange(n) * 7 % 256 for n in lengths], PADDING)[0]
        truth = next_byte_loss(model, ids)
        with context_parallel(dist.group.WORLD):
            own = next_byte_loss(model, ids).detach()
        dist.all_reduce(own)
        pairs.append((truth.item(), own.item()))
    return pairs


def test_losses_of_pieces_add_up(in_processes):
    for pairs in in_processes(2, cut_losses):
        for truth, found in pairs:
            assert found == pytest.approx(truth, abs=1e-6)
