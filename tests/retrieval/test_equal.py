"""Repeated keys: how they are found, and exact search among them against float64 by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.retrieval.build_index import build_index
from ctx_distill.retrieval.equal import EqualKeys, equal_keys, first_near
from ctx_distill.retrieval.exact import exact_neighbours
from ctx_distill.retrieval.index import XrayIndex, faiss_module, knn
from ctx_distill.retrieval.keys import share_keys
from ctx_distill.retrieval.sharded import ShardedIndex


def unit(rows: int, dimension: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed)), dim=-1)


def repeated(rows: int, distinct: int, dimension: int, seed: int) -> Tensor:
    """Keys of which most repeat others, the first far more often than the last."""
    draw = np.random.default_rng(seed)
    chosen = (distinct * draw.random(rows) ** 3).astype(np.int64)
    return unit(distinct, dimension, seed)[torch.from_numpy(chosen)]


def by_hand(keys: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.double().numpy() @ keys.double().numpy().T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def first_of_numpy(keys: Tensor) -> np.ndarray:
    _, first, inverse = np.unique(keys.numpy(), axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


@pytest.mark.parametrize("dimension", [3, 16, 96])
def test_equal_keys_are_those_of_numpy(dimension: int) -> None:
    keys = repeated(700, 90, dimension, seed=dimension)
    assert np.array_equal(first_near(keys, 0.0), first_of_numpy(keys))
    assert np.array_equal(first_near(keys.numpy(), 0.0), first_of_numpy(keys))


@pytest.mark.parametrize("share", [0.5, 0.99, 1.0])
def test_a_key_that_most_positions_share_is_found(share: float) -> None:
    """The mean of such keys is nearly that key: no plane may pass through it."""
    keys = unit(800, 24, 0)
    keys[torch.rand(800, generator=torch.Generator().manual_seed(1)) < share] = unit(1, 24, 2)[0]
    assert np.array_equal(first_near(keys, 0.0), first_of_numpy(keys))
    noise = 3e-8 * torch.randn(800, 24, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(first_near(keys + noise, 1e-6), first_of_numpy(keys))


def test_distinct_keys_have_no_table() -> None:
    assert equal_keys(unit(300, 8, 0)) is None
    assert equal_keys(unit(1, 8, 0)) is None


def test_the_table_by_hand(tmp_path: Path) -> None:
    a, b, c, d = unit(4, 6, 0)
    table = equal_keys(torch.stack([a, b, a, c, b, a, d]))
    assert table is not None
    assert table.order.tolist() == [0, 2, 5, 1, 4, 3, 6]
    assert table.starts.tolist() == [0, 3, 5, 6, 7]
    assert table.firsts.tolist() == [0, 1, 3, 6]
    assert table.sizes(np.array([2, 0])).tolist() == [1, 3]
    places, positions = table.positions(np.array([1, 2, 0]), 2)
    assert (places.tolist(), positions.tolist()) == ([0, 0, 1, 2, 2], [1, 4, 3, 0, 2])
    part = table.part(1, 3)
    assert (part.order.tolist(), part.starts.tolist()) == ([1, 4, 3], [0, 2, 3])
    table.save(tmp_path / "t.safetensors")
    loaded = EqualKeys.load(tmp_path / "t.safetensors")
    assert np.array_equal(loaded.order, table.order)
    assert np.array_equal(loaded.starts, table.starts)


def index_of_all(keys: Tensor) -> XrayIndex:
    """An index that knows of no repeats, as artefacts of earlier versions hold."""
    flat = faiss_module().IndexFlatIP(keys.shape[1])
    flat.add(keys.numpy())
    return XrayIndex(flat, "exact", "cpu")


def repeats_of(kind: str) -> Tensor:
    """3,000 keys: 1,200 repeat one, a hundred another, and two are neighbours of the first in its last bits."""
    keys = unit(3000, 32, 0)
    draw = torch.Generator().manual_seed(1)
    order = torch.randperm(3000, generator=draw)
    many, few, near = order[:1200], order[1200:1300], order[1300:1302]
    noise = {"equal": 0.0, "last bits": 6e-8, "nearly": 3e-5}[kind]
    keys[many] = keys[many[0]] * (1 + noise * torch.randn(1200, 32, generator=draw))
    keys[few] = keys[few[0]].clone()
    keys[near] = keys[many[0]] * (1 + 1e-7)
    return keys


@pytest.mark.parametrize("kind", ["equal", "last bits", "nearly"])
def test_exact_search_among_repeats_is_the_search_by_hand(kind: str) -> None:
    keys = repeats_of(kind)
    centre = F.normalize(keys.mean(dim=0), dim=0)
    queries = torch.cat([unit(3, 32, 5), F.normalize(centre + 0.1 * unit(4, 32, 6), dim=-1), keys[10:12]])
    built, plain, sharded = build_index(keys, device="cpu"), index_of_all(keys), ShardedIndex(keys, "cpu")
    assert len(built) == len(plain) == 3000
    assert (len(built.keys) < 2000) == (kind == "equal")
    for k in (1, 8, 64, 1190, 1400, 3000):
        scores, order = by_hand(keys, queries, k)
        for index in (built, plain, sharded, ShardedIndex.of(built, "cpu")):
            similarity, position = index.search(queries, k)
            assert np.array_equal(position, order)
            assert np.array_equal(similarity, scores)
            alone = [index.search(query[None], k) for query in queries]
            assert torch.equal(similarity, torch.cat([one[0] for one in alone]))
            assert torch.equal(position, torch.cat([one[1] for one in alone]))


@pytest.mark.parametrize("ranks", [2, 5])
def test_parts_of_the_table_merge_to_the_whole(ranks: int) -> None:
    from ctx_distill.retrieval.exact import merge

    keys = repeated(600, 40, 16, seed=3)
    built, queries = build_index(keys, device="cpu"), unit(6, 16, 4)
    table, distinct = built.equal, built.keys
    assert table is not None
    for k in (1, 8, 100):
        found = []
        for rank in range(ranks):
            start, end = len(distinct) * rank // ranks, len(distinct) * (rank + 1) // ranks
            own, part = distinct[start:end], table.part(start, end)
            within = min(k, len(part.order))
            found.append(
                exact_neighbours(lambda q, width, own=own: knn(q, own, width), own, queries.numpy(), within, part)  # type: ignore[misc]
            )
        joined = merge(*(np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)), k)
        for mine, theirs in zip(joined, by_hand(keys, queries, k), strict=True):
            assert np.array_equal(mine, theirs)


def test_more_candidates_are_tried_where_the_index_offers_them() -> None:
    """As on a GPU, where comparing with all keys on the host is the last resort."""
    keys, queries = repeats_of("last bits"), unit(2, 32, 5)
    queries[1] = F.normalize(keys.mean(dim=0), dim=0)
    widths: list[int] = []

    def find(asked: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        widths.append(width)
        return knn(asked, keys.numpy(), width)

    found = exact_neighbours(find, keys.numpy(), queries.numpy(), 8, widths=(2048,))
    assert widths == [24, 2048]
    for mine, theirs in zip(found, by_hand(keys, queries, 8), strict=True):
        assert np.array_equal(mine, theirs)


def test_equal_texts_share_the_first_one_s_embedding() -> None:
    text = unit(6, 4, 0)
    expected = text[[0, 1, 0, 3, 1, 0]].clone()
    share_keys(text, ["a", "b", "a", "c", "b", "a"])
    assert torch.equal(text, expected)
