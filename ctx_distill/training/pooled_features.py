"""The CT encoder's pooled features of a manifest on disk: computed once, read by whatever is fitted on them.

They take 4 D_c bytes per row on disk and 8 D_c bytes where they are read: 3 and 6 KB at D_c = 768, so 6 GB at a million rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ctx_distill.files import hash_json, write_bytes

FEATURES = "features.safetensors"


def features_key(encoder: str, manifest: str) -> str:
    """What features belong to.

    Args:
        encoder: fingerprint of the artefact that holds the encoder.
        manifest: fingerprint of the manifest.
    """
    return hash_json([encoder, manifest])


def write_features(folder: Path, key: str, pooled: NDArray[np.float32]) -> None:
    """Write the features (N, D_c) of all N rows of a manifest into a folder."""
    write_bytes(folder / FEATURES, save({"pooled": pooled}, metadata={"key": key}))


def read_features(folder: Path, key: str) -> NDArray[np.float64] | None:
    """(N, D_c) by manifest row; None where none stand, where they belong to something else, or are damaged."""
    path = folder / FEATURES
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as handle:
            if (handle.metadata() or {}).get("key") != key:
                return None
            pooled: NDArray[np.float64] = handle.get_tensor("pooled").astype(np.float64)
            return pooled
    except (SafetensorError, OSError):
        return None
