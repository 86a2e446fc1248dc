"""Teacher targets out of an index, against NumPy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.retrieval.store import XrayIndexArtefact, write_index_artefact
from ctx_distill.types import InputError

NAN = float("nan")
ROWS = 60


def unit(rows: int, dimension: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed)), dim=-1)


KEYS, VALUES, QUERIES = unit(ROWS, 6, 0), unit(ROWS, 4, 1), unit(5, 6, 2)
FINDINGS = torch.randint(-1, 2, (ROWS, 4), generator=torch.Generator().manual_seed(3)).float()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[XrayIndexArtefact, XrayIndexArtefact]:
    """With findings, and without."""
    names = [str(i) for i in range(ROWS)]
    items = pd.DataFrame(dict.fromkeys(("study_id", "image_id", "patient_id"), names)).assign(
        row=range(ROWS), split="train"
    )
    folder = tmp_path_factory.mktemp("index")
    upstream = {"xray-expert": "e"}
    return (
        write_index_artefact(folder / "a", KEYS, VALUES, items, upstream, {}, findings=FINDINGS),
        write_index_artefact(folder / "b", KEYS, VALUES, items, upstream, {}),
    )


Stores = tuple[XrayIndexArtefact, XrayIndexArtefact]


def mixed(positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = (VALUES.numpy()[positions] * weights[..., None]).sum(1)
    return total / np.linalg.norm(total, axis=1, keepdims=True)


@pytest.mark.parametrize("mode", ["nearest", "mean", "softmax"])
def test_modes_against_numpy(stores: Stores, mode: str) -> None:
    found = NeighbourLookup(stores[1], k=3, mode=mode, temperature=0.2).look_up(QUERIES)  # type: ignore[arg-type]
    scores = QUERIES.numpy() @ KEYS.numpy().T
    order = np.argsort(-scores, axis=1)[:, :3]
    near = np.take_along_axis(scores, order, 1)
    soft = np.exp(near / 0.2) / np.exp(near / 0.2).sum(1, keepdims=True)
    weights = {"nearest": np.eye(3)[[0] * 5], "mean": np.full((5, 3), 1 / 3), "softmax": soft}[mode]
    assert np.array_equal(found["positions"], order)
    assert np.allclose(found["similarity"], near, atol=1e-5)
    assert np.allclose(found["weights"], weights, atol=1e-5)
    assert np.allclose(found["features"], mixed(order, weights), atol=1e-5)
    if mode == "nearest":
        assert torch.allclose(found["features"], VALUES[order[:, 0]], atol=1e-6)


def test_sampling_follows_the_softmax_and_its_draws(stores: Stores) -> None:
    lookup = NeighbourLookup(stores[1], k=3, mode="sample", temperature=0.5)
    many = QUERIES[:1].expand(3000, -1)
    draws = torch.rand(3000, generator=torch.Generator().manual_seed(5))
    found = lookup.look_up(many, draws=draws)
    part = lookup.look_up(many[:7], draws=draws[1000:1007])  # a query's neighbour does not depend on the others
    assert torch.equal(found["weights"][1000:1007], part["weights"])
    ends = lookup.look_up(many[:2], draws=torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64))
    assert ends["weights"].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert torch.equal(found["weights"].sum(1), torch.ones(3000))
    expected = NeighbourLookup(stores[1], k=3, mode="softmax", temperature=0.5).look_up(QUERIES[:1])["weights"][0]
    assert torch.allclose(found["weights"].mean(0), expected, atol=0.03)
    chosen = found["positions"].gather(1, found["weights"].argmax(1, keepdim=True))[:, 0]
    assert torch.allclose(found["features"], VALUES[chosen], atol=1e-6)


@pytest.mark.parametrize("visible", [None, [True, False, True, False]])
def test_findings_rerank_against_brute_force(stores: Stores, visible: list[bool] | None) -> None:
    own = torch.tensor([[1, 0, 0, NAN], [NAN, NAN, NAN, NAN], [1, 1, -1, 0], [0, 0, 0, 0], [-1, -1, -1, -1]])
    mask = None if visible is None else torch.tensor(visible)
    lookup = NeighbourLookup(stores[0], k=4, mode="mean", findings_rerank=True, visible=mask, candidates=20)
    found = lookup.look_up(QUERIES, own)
    scores = QUERIES.numpy() @ KEYS.numpy().T
    for i in range(5):
        ranked = []
        for j in np.argsort(-scores[i])[:20]:
            differs = 0
            for f in range(4):
                a, b = float(own[i, f]), float(FINDINGS[j, f])
                if (visible is None or visible[f]) and a != -1 and b != -1:
                    differs += (a == 1) != (b == 1)
            ranked.append((differs, -scores[i, j], int(j)))
        assert found["positions"][i].tolist() == [j for _, _, j in sorted(ranked)[:4]]
    assert np.allclose(found["features"], mixed(found["positions"].numpy(), np.full((5, 4), 0.25)), atol=1e-5)
    with pytest.raises(ValueError, match="got no findings"):
        lookup.look_up(QUERIES)


def test_shuffled_control_swaps_every_neighbour_for_a_fixed_other(stores: Stores) -> None:
    plain = NeighbourLookup(stores[1], k=3).look_up(QUERIES)
    shuffled = NeighbourLookup(stores[1], k=3, shuffle_seed=1)
    found = shuffled.look_up(QUERIES)
    assert torch.equal(found["positions"], shuffled.look_up(QUERIES)["positions"])
    assert torch.equal(found["weights"], plain["weights"])
    assert (found["positions"] != plain["positions"]).all()
    assert shuffled.permutation is not None
    assert sorted(shuffled.permutation.tolist()) == list(range(ROWS))
    assert np.allclose(found["features"], mixed(found["positions"].numpy(), np.full((5, 3), 1 / 3)), atol=1e-5)


def test_no_gradient_and_an_empty_batch(stores: Stores) -> None:
    queries = QUERIES.clone().requires_grad_()
    assert not NeighbourLookup(stores[1], k=2).look_up(queries)["features"].requires_grad
    for mode in ("mean", "softmax", "sample", "nearest"):
        assert NeighbourLookup(stores[1], k=2, mode=mode).look_up(QUERIES[:0])["features"].shape == (0, 4)  # type: ignore[arg-type]


def test_refusals(stores: Stores) -> None:
    with pytest.raises(InputError, match="61 neighbours requested from an index of 60"):
        NeighbourLookup(stores[1], k=61)
    with pytest.raises(InputError, match="built without them"):
        NeighbourLookup(stores[1], findings_rerank=True)
    with pytest.raises(ValueError, match="mode is 'best'"):
        NeighbourLookup(stores[1], mode="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature is 0"):
        NeighbourLookup(stores[1], temperature=0)
