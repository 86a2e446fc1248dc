"""What the index is searched by: the X-ray's report, its image, or both; and the query that fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

KeyKind = Literal["text", "image", "both"]
CHUNK = 65_536
KEY_KINDS: tuple[KeyKind, ...] = ("text", "image", "both")


def make_keys(kind: KeyKind, text: Tensor, image: Tensor, centred: bool) -> Tensor:
    """Keys of the pool (method, stage 1: key = text, image or mixed).

    `both` is (**ours**) the two unit vectors end to end over sqrt(2): with the query of `make_queries`, the inner
    product is the mean of the two cosines.

    Args:
        kind: `text`: v_j; `image`: u_j; `both`.
        text: (N, D) unit rows v_j; not read for `image`.
        image: (N, D) unit rows u_j; not read for `text`.
        centred: take the mean off each part by itself, as image and text embeddings of one joint space lie in two
            cones apart (Liang et al. 2022, "Mind the Gap").

    Returns:
        (N, D), or (N, 2 D) of `both`, unit rows.
    """
    rows = [{"text": text, "image": image}[part] for part in ("text", "image") if kind in (part, "both")]
    means = [part.mean(dim=0) if centred else None for part in rows]
    keys = rows[0].new_empty(len(rows[0]), sum(part.shape[1] for part in rows))
    for start in range(0, len(keys), CHUNK):  # of a large pool one copy is enough
        cut = [part[start : start + CHUNK] for part in rows]
        cut = [part if mean is None else centre(part, mean) for part, mean in zip(cut, means, strict=True)]
        keys[start : start + CHUNK] = torch.cat(cut, dim=1) / math.sqrt(len(rows))
    return keys


def share_keys(text: Tensor, texts: Sequence[str]) -> None:
    """Give equal texts the embedding of the first of them, in place.

    Their own differ in the last bits, in bf16 in more, as the other texts of a batch do. Left so, the order of X-rays with
    the same report would depend on the batches, and thus on the number of ranks.

    Args:
        text: (N, D).
        texts: N.
    """
    codes, _ = pd.factorize(np.array(texts, dtype=object))
    first = np.unique(codes, return_index=True)[1][codes]
    again = np.flatnonzero(first != np.arange(len(texts)))
    text[torch.from_numpy(again)] = text[torch.from_numpy(first[again])]


def make_queries(kind: KeyKind, reports: Tensor, mean: Tensor | None = None) -> Tensor:
    """Queries for keys of a kind, from report embeddings.

    A report is compared with either part by the same vector q_i: in the joint space of a contrastively trained expert
    it lies beside images as well as beside texts.

    Args:
        kind: of the keys.
        reports: (B, D) unit rows q_i.
        mean: (D,) of the queries, taken off first where the keys were centred.

    Returns:
        (B, D), or (B, 2 D) for `both`, unit rows.
    """
    if mean is not None:
        reports = centre(reports, mean.to(reports))
    return torch.cat([reports, reports], dim=1) / math.sqrt(2) if kind == "both" else reports


def centre(rows: Tensor, mean: Tensor) -> Tensor:
    """Unit rows (N, D) of what is left without the mean (D,)."""
    return F.normalize(rows - mean, dim=-1)
