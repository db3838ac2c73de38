"""Perplexity, KL and the timing loop against what their definitions give."""

from __future__ import annotations

import logging
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from octavo.models import evaluate


class Table(torch.nn.Module):
    """A bigram model: the logits after token i are row i."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        return SimpleNamespace(logits=self.logits[ids][:, -logits_to_keep:], past_key_values=past_key_values)


@pytest.fixture
def logits():
    return torch.randn(11, 11, generator=torch.Generator().manual_seed(0))


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    score = evaluate.perplexity(Table(torch.zeros(11, 11)), torch.arange(33).reshape(3, 11) % 11)
    assert score.perplexity == pytest.approx(11.0)
    assert score.tokens == 30
    assert math.isnan(score.kl)


def test_perplexity_is_that_of_cross_entropy(logits):
    ids = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(1))
    seen = []
    score = evaluate.perplexity(Table(logits), ids, lambda so_far: seen.append(so_far.tokens))
    loss = torch.nn.functional.cross_entropy(logits[ids[:, :-1]].reshape(-1, 11), ids[:, 1:].reshape(-1))
    assert score.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert seen == [8, 16, 24, 32]


def test_kl_is_that_of_torch_and_zero_to_itself(logits):
    ids = torch.arange(10)
    other = logits + 0.3 * torch.randn(11, 11, generator=torch.Generator().manual_seed(2))
    exact, changed = (evaluate.log_probabilities(Table(t), ids) for t in (logits, other))
    score, same = evaluate.Score(), evaluate.Score()
    score.add(changed, ids, exact)
    same.add(exact, ids, exact)
    expected = torch.nn.functional.kl_div(changed, exact, log_target=True, reduction="sum").item() / 10
    assert expected > 0.01
    assert score.kl == pytest.approx(expected, rel=1e-5)
    assert same.kl == 0.0


def test_perplexity_beyond_floats_is_infinite():
    assert evaluate.Score(tokens=1, nats=1e4).perplexity == math.inf


def test_windows_are_whole_and_in_order():
    assert evaluate.windows(list(range(11)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluate.windows(list(range(11)), 4, 1).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("context", "limit", "message"),
    [
        (1, None, "context must be at least 2, got 1"),
        (4, 0, "at least 1, got 0"),
        (12, None, "the text has 11 tokens, fewer than one window of 12"),
    ],
)
def test_windows_say_what_is_wrong(context, limit, message):
    with pytest.raises(ValueError, match=message):
        evaluate.windows(list(range(11)), context, limit)


def test_generate_is_greedy_and_stops(logits):
    model, follow = Table(logits), logits.argmax(-1).tolist()
    _, seconds, ids = evaluate.generate(model, torch.tensor([3, 5]), 4)
    assert ids == [follow[5], follow[follow[5]], follow[follow[follow[5]]], follow[follow[follow[follow[5]]]]]
    assert len(seconds) == 3
    assert evaluate.generate(model, torch.tensor([3, 5]), 4, stop=(follow[5],))[2] == [follow[5]]


def test_generation_warns_of_nothing():
    """By the names that the installed transformers wants; its logger says a warning once only, which is undone here."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes)).eval()
    said: list[str] = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("transformers")
    handler.emit = lambda record: said.append(record.getMessage())
    if hasattr(logging.Logger.warning_once, "cache_clear"):
        logging.Logger.warning_once.cache_clear()
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            *_, chosen = evaluate.generate(model, torch.arange(7), 3)
            evaluate.log_probabilities(model, torch.arange(7))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert said == []
    with torch.inference_mode():  # and the cache went on from what came before
        ids = torch.arange(7)
        for token in chosen:
            assert int(model(ids[None], use_cache=False).logits[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([token])))


def test_the_cache_goes_by_the_name_that_the_model_takes():
    class Old:
        def forward(self, ids, past_key_values=None):
            pass

    class New:
        def forward(self, ids, cache=None):
            pass

    old, new = SimpleNamespace(past_key_values=7), SimpleNamespace(cache=7)
    assert evaluate.cache_of(Old(), old) == {"past_key_values": 7}
    assert evaluate.cache_of(New(), new) == {"cache": 7}
    assert evaluate.cache_of(Old(), new) == {"past_key_values": 7}  # a model's own code under a new transformers


def test_speed_counts_tokens(logits):
    calls = []

    class Watched(Table):
        def forward(self, ids, **keywords):
            calls.append((id(self), ids.shape[1]))
            return super().forward(ids, **keywords)

    models = [Watched(logits), Watched(logits)]
    speeds = evaluate.speed(models, torch.arange(7), steps=3, rounds=2)
    turn = [[(id(model), 7), (id(model), 1), (id(model), 1)] for model in models]
    assert calls == (turn[0] + turn[1]) * 3
    calls.clear()
    turns = []
    evaluate.speed(models, torch.arange(7), steps=3, rounds=2, warm=True, begin=lambda *turn: turns.append(turn))
    assert turns == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert calls == (turn[0] + turn[1]) * 2
    assert [len(s.prefill_seconds) for s in speeds] == [2, 2]
    assert [len(s.step_seconds) for s in speeds] == [4, 4]
    assert evaluate.Speed(8, [1.0, 2.0, 9.0], [0.5, 0.25, 0.125]).prefill == 4.0
    assert evaluate.Speed(8, [1.0, 2.0, 9.0], [0.5, 0.25, 0.125]).decode == 4.0


def test_model_bytes_counts_tied_tensors_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    assert evaluate.model_bytes(model) == 128
    model[1].weight = model[0].weight
    assert evaluate.model_bytes(model) == 64


def test_peak_memory_covers_what_was_touched():
    before = evaluate.peak_memory()
    if before is None:
        pytest.skip("this system does not say")
    block = torch.ones(16 << 20)
    assert evaluate.peak_memory() >= max(before, block.nbytes)
    assert before > 50 << 20  # torch alone
