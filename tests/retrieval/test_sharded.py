"""The index in parts over 1, 2 and 4 ranks against one process with all keys, and against float64 by hand."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ctx_distill import distributed
from ctx_distill.retrieval.build_index import build_index
from ctx_distill.retrieval.sharded import ShardedIndex
from ctx_distill.types import InputError

STEPS = 200
BATCHES = {1: [7], 2: [5, 2], 4: [3, 0, 4, 1]}


def unit(rows: int, dimension: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed)), dim=-1)


def table(rows: int = 203) -> Tensor:
    """Keys of which every third is one and the same, as reports of normal X-rays are."""
    keys = unit(rows, 16, 0)
    keys[::3] = unit(1, 16, 9)[0]
    return keys


def by_hand(keys: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.double().numpy() @ keys.double().numpy().T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def ranks_search(keys: Tensor, queries: Tensor, rows: list[int], ks: list[int]) -> list[Any]:
    start = sum(rows[: distributed.rank()])
    index = ShardedIndex(keys, "cpu")
    return [list(index.search(queries[start : start + rows[distributed.rank()]], k)) for k in ks]


@pytest.mark.ddp
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_merged_equal_the_whole(size: int, pool: Callable[[int], Any]) -> None:
    keys, rows, ks = table(), BATCHES[size], [1, 8, 60, 150, 203]  # the larger ones than a part
    queries = torch.cat([unit(sum(rows) - 2, 16, 1), unit(1, 16, 9), keys[5:6]])
    arguments = {"keys": keys, "queries": queries, "rows": rows, "ks": ks}
    found = pool(size).run(__file__, "ranks_search", arguments) if size > 1 else [ranks_search(**arguments)]
    whole = build_index(keys)
    for place, k in enumerate(ks):
        similarity = torch.cat([rank[place][0] for rank in found])
        position = torch.cat([rank[place][1] for rank in found])
        expected = whole.search(queries, k)
        assert torch.equal(similarity, expected[0])
        assert torch.equal(position, expected[1])
        scores, order = by_hand(keys, queries, k)
        assert np.array_equal(position, order)
        assert np.array_equal(similarity, scores)


@pytest.mark.ddp
@pytest.mark.parametrize("size", [2, 4])
def test_more_ranks_than_keys(size: int, pool: Callable[[int], Any]) -> None:
    keys, queries = unit(3, 8, 0), unit(sum(BATCHES[size]), 8, 1)
    arguments = {"keys": keys, "queries": queries, "rows": BATCHES[size], "ks": [1, 3]}
    found = pool(size).run(__file__, "ranks_search", arguments)
    for place, k in enumerate([1, 3]):
        assert np.array_equal(torch.cat([rank[place][1] for rank in found]), by_hand(keys, queries, k)[1])


def ranks_train(keys: Tensor) -> dict[str, Any]:
    """Steps of unequal length; other collectives of the default group, some still on their way, between the searches."""
    rank, ranks = distributed.rank(), distributed.world_size()
    pace, index, wrong = random.Random(rank), ShardedIndex(keys, "cpu"), []
    for step in range(STEPS):
        time.sleep(pace.choice([0, 0, 0.001, 0.004]) * (1 + 2 * (rank == step % ranks)))
        gradient = torch.full((1000,), float(rank + step))
        on_its_way = dist.all_reduce(gradient, async_op=True)
        queries = unit((step + rank) % 4, 16, 1000 * step + rank)
        similarity, position = index.search(queries, 5)
        scores, order = by_hand(keys, queries, 5)
        if step % 3 == 0:
            dist.barrier()
        on_its_way.wait()
        right = np.array_equal(position, order) and np.array_equal(similarity, scores)
        total = ranks * step + ranks * (ranks - 1) / 2
        if not right or not bool((gradient == total).all()):
            wrong.append(step)
    return {"wrong": wrong, "steps": STEPS}


@pytest.mark.ddp
def test_200_steps_of_ranks_of_unequal_speed(pool: Callable[[int], Any]) -> None:
    for found in pool(4).run(__file__, "ranks_train", {"keys": table()}):
        assert found == {"wrong": [], "steps": 200}


def ranks_ask_wrongly(keys: Tensor) -> list[str]:
    index, told = ShardedIndex(keys, "cpu"), []
    for queries, k in (
        (unit(2, 16 - distributed.rank(), 0), 3),
        (unit(2, 16, 0), 500),
        (unit(2, 16, 0), 3 + distributed.rank()),
    ):
        try:
            index.search(queries, k)
        except (InputError, RuntimeError) as error:
            told.append(str(error))
    told.append(str(index.search(unit(1, 16, 0), 1)[1].shape))
    return told


@pytest.mark.ddp
def test_a_wrong_question_of_one_rank_is_an_error_on_all(pool: Callable[[int], Any]) -> None:
    for told in pool(2).run(__file__, "ranks_ask_wrongly", {"keys": table()}):
        assert "queries have 15 dimensions, the X-ray index 16" in told[0]
        assert "500 neighbours requested from an index of 203" in told[1]
        assert "request [3, 4] neighbours" in told[2]
        assert told[3] == "torch.Size([1, 1])"


def test_only_this_ranks_part_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = table(100)
    keys[:50] = float("nan")  # the other rank's
    monkeypatch.setattr("ctx_distill.retrieval.sharded.rank", lambda: 1)
    index = ShardedIndex(keys, "cpu")
    monkeypatch.setattr("ctx_distill.retrieval.sharded.world_size", lambda: 2)
    monkeypatch.setattr("ctx_distill.retrieval.sharded.host_group", lambda: None)
    monkeypatch.setattr("ctx_distill.retrieval.sharded.dist.group", type("Group", (), {"WORLD": object()}))
    index._open_shard()
    assert (index._start, index._part.shape) == (50, (50, 16))
    similarity, position = index._search_part(keys[61:62].numpy(), 3)
    assert position[0, 0] == 61
    assert np.isfinite(similarity).all()
