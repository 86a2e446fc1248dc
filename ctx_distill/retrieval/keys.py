"""Keys of the index, from the X-ray's report, its image or both, and the matching queries."""

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
    """Return the keys of the pool (method, stage 1).

    `both` (**ours**) concatenates the two unit vectors and divides by sqrt(2), so that the inner product with the query
    of `make_queries` is the mean of the two cosines.

    Args:
        kind: `text`: v_j; `image`: u_j; `both`.
        text: (N, D) unit rows v_j; unused for `image`.
        image: (N, D) unit rows u_j; unused for `text`.
        centred: Subtract the mean of each part separately, because image and text embeddings of a joint space form two
            separate cones (Liang et al. 2022, "Mind the Gap").

    Returns:
        (N, D), or (N, 2 D) of `both`, unit rows.
    """
    rows = [{"text": text, "image": image}[part] for part in ("text", "image") if kind in (part, "both")]
    means = [part.mean(dim=0) if centred else None for part in rows]
    keys = rows[0].new_empty(len(rows[0]), sum(part.shape[1] for part in rows))
    for start in range(0, len(keys), CHUNK):  # in chunks, to avoid a second copy of a large pool
        cut = [part[start : start + CHUNK] for part in rows]
        cut = [part if mean is None else centre(part, mean) for part, mean in zip(cut, means, strict=True)]
        keys[start : start + CHUNK] = torch.cat(cut, dim=1) / math.sqrt(len(rows))
    return keys


def share_keys(text: Tensor, texts: Sequence[str]) -> None:
    """Replace the embeddings of equal texts by that of the first of them, in place.

    Embeddings of equal texts differ in their last bits with the batch. The order of X-rays with the same report would
    otherwise depend on the batches, and so on the number of ranks.

    Args:
        text: (N, D) embeddings.
        texts: N texts.
    """
    codes, _ = pd.factorize(np.array(texts, dtype=object))
    first = np.unique(codes, return_index=True)[1][codes]
    again = np.flatnonzero(first != np.arange(len(texts)))
    text[torch.from_numpy(again)] = text[torch.from_numpy(first[again])]


def make_queries(kind: KeyKind, reports: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return queries for keys of a kind, from report embeddings.

    With `both`, the same vector q_i is compared with texts and with images, which share the expert's joint space.

    Args:
        kind: Kind of the keys.
        reports: (B, D) unit rows q_i.
        mean: (D,) mean of the queries, which is subtracted first; None if the keys were not centred.

    Returns:
        (B, D), or (B, 2 D) for `both`, unit rows.
    """
    if mean is not None:
        reports = centre(reports, mean.to(reports))
    return torch.cat([reports, reports], dim=1) / math.sqrt(2) if kind == "both" else reports


def centre(rows: Tensor, mean: Tensor) -> Tensor:
    """Subtract the mean (D,) and return unit rows (N, D)."""
    return F.normalize(rows - mean, dim=-1)
