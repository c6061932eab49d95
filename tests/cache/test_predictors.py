"""Predictors: what they know, what they compute, and how they are measured."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from moesim.caching.events import decode_stream
from moesim.caching.predictors.base import accuracy, predict
from moesim.caching.predictors.registry import PREDICTORS, make_predictor, usable_predictors
from moesim.errors import InputError, MismatchError, UnknownNameError

ONLINE = [name for name in PREDICTORS if name != "oracle"]


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("depth", [1, 2])
def test_no_predictor_sees_the_future(toys: ModuleType, name: str, depth: int) -> None:
    """Whatever token t chooses after the source layer, and whatever later tokens of its request
    or any token of later requests choose, the scores up to token t stay the same."""
    trace = toys.random_trace(3, num_requests=4, tokens=12, layers=4)
    requests = toys.all_requests(trace)
    tune, held = (requests.select(np.isin(requests.ids, ids)) for ids in ([0, 1], [2, 3]))
    predictor = make_predictor(name, depth)
    predictor.fit(trace, tune)
    fitted = deepcopy(predictor)
    stream = decode_stream(held, 1, seed=0)
    rng = np.random.default_rng(0)
    for layer in (1, 2, 3):
        before = predictor.scores(trace, stream, layer)
        for t in (0, 5, 13):
            ids = np.asarray(trace.expert_ids).copy()
            source = max(0, layer - depth)
            token = stream.token_idx[t]
            ids[token, source + 1 :] = rng.permuted(np.tile(np.arange(8), (3 - source, 1)), axis=1)[
                :, :2
            ]
            for later in stream.token_idx[t + 1 :]:
                ids[later] = rng.permuted(np.tile(np.arange(8), (4, 1)), axis=1)[:, :2]
            other = deepcopy(fitted)
            after = other.scores(replace(trace, expert_ids=ids), stream, layer)
            assert after[: t + 1] == pytest.approx(before[: t + 1], abs=1e-6)


def test_previous_layer_by_hand(toys: ModuleType) -> None:
    """Layer 1 chooses 2 after 0 (twice) and 3 after 1 (once); overall 2 has 2/3 and 3 has 1/3.
    P(2 | 0) = (2 + 4 x 2/3) / (2 + 4) = 7/9, P(3 | 0) = (0 + 4/3) / 6 = 2/9."""
    ids = np.array([[[0], [2]], [[0], [2]], [[1], [3]]])
    trace = toys.make_trace([ids, ids], 4)
    requests = toys.all_requests(trace)
    predictor = make_predictor("previous-layer", 1)
    predictor.fit(trace, requests.select(requests.ids == 0))
    stream = decode_stream(requests.select(requests.ids == 1))
    score = predictor.scores(trace, stream, 1)
    assert score[0] == pytest.approx([0, 0, 7 / 9, 2 / 9])


def test_token_id_by_hand(toys: ModuleType) -> None:
    """Id 7 chose expert 1 once; overall 0 and 1 have half each. Share of 1: (1 + 0.5) / (1 + 1).
    Id 9 was never seen: the overall frequency."""
    ids = np.array([[[0], [1]], [[0], [0]]])
    trace = toys.make_trace([ids, ids], 2, token_ids=np.array([7, 8, 7, 9], np.int32))
    requests = toys.all_requests(trace)
    predictor = make_predictor("token-id", 1)
    predictor.fit(trace, requests.select(requests.ids == 0))
    stream = decode_stream(requests.select(requests.ids == 1))
    score = predictor.scores(trace, stream, 1)
    assert score[0] == pytest.approx([0.25, 0.75])
    assert score[1] == pytest.approx([0.5, 0.5])


def test_history_takes_the_nearest_request(toys: ModuleType) -> None:
    """Two tuning requests choose 0 then 2 and 1 then 3; a third request begins with 1, so from its
    second token on layer 1 is predicted to be 3, and at its first by the overall frequency."""
    one, two = np.array([[[0], [2]]] * 3), np.array([[[1], [3]]] * 3)
    trace = toys.make_trace([one, two, two], 4)
    requests = toys.all_requests(trace)
    predictor = make_predictor("history", 1)
    predictor.fit(trace, requests.select(requests.ids < 2))
    stream = decode_stream(requests.select(requests.ids == 2))
    assert predictor.scores(trace, stream, 1).tolist() == [
        [0, 0, 0.5, 0.5],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
    ]


def test_learned_beats_popularity_where_there_is_something_to_learn(toys: ModuleType) -> None:
    """Layer 1 chooses the expert two after layer 0's: deterministic, popularity knows nothing."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, 400)
    ids = np.stack([first, (first + 2) % 8], axis=1)[:, :, None]
    trace = toys.make_trace([ids[:200], ids[200:]], 8)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests.select(requests.ids == 1))
    found = {}
    for name in ("popularity", "learned"):
        predictor = make_predictor(name, 1)
        predictor.fit(trace, requests.select(requests.ids == 0))
        found[name] = accuracy(predict(predictor, trace, stream, 1).expert, trace, stream).recall[0]
    assert found["learned"] == 1.0
    assert found["popularity"] < 0.3


def test_oracle_is_exact_and_accuracy_counts(toys: ModuleType) -> None:
    """Width 2 of top-2: all right. Width 1: precision 1, recall 1/2. With one wrong expert beside
    the right one: precision 1/2, recall 1, one wasted a token."""
    trace = toys.random_trace(0)
    stream = decode_stream(toys.all_requests(trace))
    oracle = make_predictor("oracle", 1)
    exact = accuracy(predict(oracle, trace, stream, 2).expert, trace, stream)
    assert (exact.precision[0], exact.recall[0], exact.wasted_per_token) == (1.0, 1.0, 0.0)
    half = accuracy(predict(oracle, trace, stream, 1).expert, trace, stream)
    assert (half.precision[0], half.recall[0]) == (1.0, 0.5)
    one = toys.make_trace([np.array([[[0], [0]], [[0], [1]]])], 3)
    guess = np.array([[[-1, -1], [0, 2]], [[-1, -1], [2, 1]]], np.int16)
    found = accuracy(guess, one, decode_stream(toys.all_requests(one)))
    assert (found.precision[0], found.recall[0], found.wasted_per_token) == (0.5, 1.0, 1.0)


def test_batches_sum_their_tokens(toys: ModuleType) -> None:
    """Two tokens in a step want 1 and 2; the oracle predicts both, each once."""
    ids = [np.array([[[0], [1]]]), np.array([[[0], [2]]])]
    trace = toys.make_trace(ids, 3)
    stream = decode_stream(toys.all_requests(trace), 2)
    predicted = predict(make_predictor("oracle", 1), trace, stream, 3).expert
    assert sorted(predicted[0, 1].tolist()) == [-1, 1, 2]
    assert predicted[0, 0].tolist() == [-1, -1, -1]


def test_bad_input(toys: ModuleType) -> None:
    trace = replace(toys.random_trace(0), token_ids=None)
    with pytest.raises(UnknownNameError, match="psychic"):
        make_predictor("psychic", 1)
    with pytest.raises(InputError, match="depth 0"):
        make_predictor("learned", 0)
    with pytest.raises(MismatchError, match="token_ids"):
        make_predictor("token-id", 1).fit(trace, toys.all_requests(trace))
    assert "token-id" not in usable_predictors(trace)
    assert "oracle" not in usable_predictors(toys.random_trace(0))


def test_neural_learns_what_a_linear_map_cannot(toys: ModuleType) -> None:
    """Layer 1 chooses by the parity of the token's expert in layer 0 and the previous token's in
    layer 1: a product of two signals. One network a layer, the same weights every time, and the
    random state of torch is left alone."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 2000)
    second = np.zeros(2000, np.int64)
    for t in range(1, 2000):
        second[t] = first[t] ^ second[t - 1]
    ids = np.stack([first, second], axis=1)[:, :, None]
    trace = toys.make_trace([ids[:1500], ids[1500:]], 2)
    requests = toys.all_requests(trace)
    stream = decode_stream(requests.select(requests.ids == 1))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    found, scores = {}, []
    for name in ("learned", "neural", "neural"):
        predictor = make_predictor(name, 1)
        predictor.fit(trace, requests.select(requests.ids == 0))
        found[name] = accuracy(predict(predictor, trace, stream, 1).expert, trace, stream).recall[0]
        scores.append(predictor.scores(trace, stream, 1))
    assert found["learned"] < 0.7
    assert found["neural"] > 0.98
    assert scores[1].tobytes() == scores[2].tobytes()
    assert torch.equal(before, torch.random.get_rng_state())
    assert "neural" not in usable_predictors(trace)


def test_neural_without_torch(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    trace = toys.random_trace(0)
    with pytest.raises(InputError, match="not installed"):
        make_predictor("neural", 1).fit(trace, toys.all_requests(trace))
