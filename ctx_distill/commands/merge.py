"""`ctx-distill merge`."""

from __future__ import annotations

from pathlib import Path


def merge(out: Path, /, *manifests: Path) -> None:
    """Merge several manifests into one, to train on several data sets.

    Args:
        out: Manifest to write.
        manifests: Manifests to merge.
    """
    from ctx_distill.errors import InputError

    if not manifests:
        raise InputError(f"{out}: no manifests to merge were given. Expected OUT MANIFEST [MANIFEST ...].")
    print(f"merging {len(manifests)} manifests ...", flush=True)
    from ctx_distill.sources.merge import merge_manifests

    print(merge_manifests(list(manifests), out))
