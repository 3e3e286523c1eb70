"""Windows of training: a pure function of (seed, epoch), that covers the stream; and what is learnt from them."""

import numpy as np
import pytest
import torch

from polymamba.bytes.evaluation import score
from polymamba.bytes.training import TrainBytes
from polymamba.core import InputError, TrainConfig


def task(documents, context=16, seed=0, **options) -> TrainBytes:
    return TrainBytes(documents, documents, TrainConfig(**{"batch_size": 5, **options}), context, seed)


@pytest.mark.parametrize("context", [1, 7, 16, 100])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_reads_the_stream_once(documents, context, epoch):
    work = task(documents, context)
    windows = torch.cat([work.batch(starts, epoch) for starts in work.plan(epoch)])
    starts = np.concatenate(work.plan(epoch))
    stream = documents.read(0, documents.n_tokens)
    for start, window in zip(starts, windows, strict=True):
        assert window.tolist() == stream[start : start + context + 1].tolist()
    predicted = np.sort(np.concatenate([np.arange(start + 1, start + context + 1) for start in starts]))
    assert np.array_equal(predicted, np.arange(predicted[0], predicted[-1] + 1))  # each once, without a gap
    assert predicted[0] - 1 < context
    assert documents.n_tokens - 1 - predicted[-1] < context


def test_the_plan_depends_on_seed_and_epoch_alone(documents):
    def plan(seed, epoch):
        return [starts.tolist() for starts in task(documents, seed=seed).plan(epoch)]

    assert plan(1, 2) == plan(1, 2)
    assert len({str(plan(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert all(len(starts) == 5 for starts in plan(0, 0)[:-1])
    assert len(task(documents, max_tokens=48).plan(0)[0]) == 3


def test_a_corpus_shorter_than_a_window(documents):
    work = task(documents, context=100_000)
    assert [starts.tolist() for starts in work.plan(0)] == [[0]]
    assert work.batch(np.array([0]), 0)[0].tolist() == documents.read(0, documents.n_tokens).tolist()


def test_loss_is_the_mean_over_all_targets(model, documents):
    work = task(documents, context=documents.n_tokens - 1)
    (starts,) = work.plan(0)
    batch = work.batch(starts, 0)
    log_p = model(batch[:, :-1]).double().log_softmax(-1)[0]
    expected = -sum(log_p[i, batch[0, i + 1]].item() for i in range(len(log_p))) / len(log_p)
    assert work.loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_no_validation_figure_of_a_model_that_sees_the_future(model, documents):
    class Leaky(type(model)):
        def forward(self, tokens, *args, **options):
            logits = super().forward(tokens, *args, **options)
            return logits + torch.roll(tokens, -1, 1)[..., None] if torch.is_tensor(logits) else logits

    model.__class__ = Leaky
    with pytest.raises(InputError, match="sees the future"):
        task(documents).evaluate(model)


def test_learns(model, documents):
    work = task(documents, context=64)
    before = work.evaluate(model.eval())["valid_bits_per_byte"]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-2)
    for epoch in range(25):
        for starts in work.plan(epoch):
            work.loss(model, work.batch(starts, epoch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    figures = work.evaluate(model.eval())
    assert before > 7
    assert figures["valid_bits_per_byte"] < 2
    assert work.score(figures) == -score(model, documents).bits_per_byte
