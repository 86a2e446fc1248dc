"""Keys and queries of each kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.retrieval.keys import KEY_KINDS, KeyKind, make_keys, make_queries


def unit(rows: int, seed: int, shift: float = 0.0) -> Tensor:
    drawn = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn + shift, dim=-1)


TEXT, IMAGE, REPORTS = unit(9, 0, 1.0), unit(9, 1, -1.0), unit(4, 2, 0.5)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a[:, None], b[None], dim=-1)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", KEY_KINDS)
def test_inner_products_are_the_cosines_of_the_parts(kind: KeyKind, centred: bool) -> None:
    text, image, asked = TEXT, IMAGE, REPORTS
    if centred:
        text, image, asked = text - text.mean(0), image - image.mean(0), asked - REPORTS.mean(0)
    both = torch.stack([cosine(asked, text), cosine(asked, image)])
    expected = {"text": both[0], "image": both[1], "both": both.mean(0)}[kind]
    keys = make_keys(kind, TEXT, IMAGE, centred)
    queries = make_queries(kind, REPORTS, REPORTS.mean(0) if centred else None)
    assert torch.allclose(queries @ keys.T, expected, atol=1e-12)
    for rows in (keys, queries):
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows), dtype=rows.dtype))


def test_only_the_part_that_is_the_key_is_read() -> None:
    nothing = torch.zeros(0, 0)
    assert torch.equal(make_keys("text", TEXT, nothing, False), TEXT)
    assert torch.equal(make_keys("image", nothing, IMAGE, False), IMAGE)
