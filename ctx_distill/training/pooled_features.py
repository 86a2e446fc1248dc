"""Store the CT encoder's pooled features of a manifest on disk, for probes.

They take 4 D_c bytes per row on disk and 8 D_c bytes in memory (3 KB and 6 KB at D_c = 768).
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
    """Return the key that identifies features.

    Args:
        encoder: Fingerprint of the artefact that contains the encoder.
        manifest: Fingerprint of the manifest.
    """
    return hash_json([encoder, manifest])


def write_features(folder: Path, key: str, pooled: NDArray[np.float32]) -> None:
    """Write the features (N, D_c) of all N rows of a manifest to a folder."""
    write_bytes(folder / FEATURES, save({"pooled": pooled}, metadata={"key": key}))


def read_features(folder: Path, key: str) -> NDArray[np.float64] | None:
    """Return the features (N, D_c) by manifest row, or None if they are missing, corrupt or have another key."""
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
