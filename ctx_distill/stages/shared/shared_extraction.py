"""Findings of a manifest's reports: extracted once per content, shared by ranks and by runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.manifests.column_reader import cache_folder
from ctx_distill.data.manifests.manifest import ReportTexts
from ctx_distill.distributed import barrier, gather_objects, own_share, rank, world_size
from ctx_distill.parallel import usable_cores
from ctx_distill.text.extractor import load_vocabulary
from ctx_distill.text.parallel_extraction import extract_in_processes, keep, kept_file, load_kept


def extract_shared(texts: Sequence[str], vocabulary: str) -> NDArray[np.float32]:
    """Findings of N reports, each extracted by one rank and sent to all; collective.

    Of a large manifest (`ReportTexts` with a key) they are kept beside the manifest's own cache, and a later run
    loads them.

    Args:
        texts: the same on every rank.
        vocabulary: name or YAML file.

    Returns:
        (N, F) float32 as `extract_many` gives them, the same on every rank.
    """
    columns = len(load_vocabulary(vocabulary).findings)
    place = _kept_place(texts, vocabulary)
    kept = None if place is None else load_kept(place, len(texts), columns)
    if all(gather_objects([kept is not None])):
        assert kept is not None
        return kept
    found = extract_in_processes(_share_of(texts), vocabulary, max(1, usable_cores() // _ranks_on_these_cores()))
    if world_size() > 1:
        # as bytes of one value each: what is sent is small, and needs no device
        sent = gather_objects([np.nan_to_num(found, nan=2).astype(np.int8).tobytes()])
        whole = np.frombuffer(b"".join(sent), dtype=np.int8).reshape(-1, columns).astype(np.float32)
        whole[whole == 2] = np.nan
        found = whole
    if place is not None and rank() == 0:
        keep(place, found)
    barrier()  # a rank that asks again finds what rank 0 kept
    return found


def _share_of(texts: Sequence[str]) -> Sequence[str]:
    """This rank's texts: the ranks' shares follow each other."""
    if world_size() == 1:
        return texts
    share = own_share(len(texts))
    if not isinstance(texts, ReportTexts):
        return texts[share]
    chosen = np.zeros(len(texts), dtype=bool)
    chosen[share] = True
    return texts.manifest.where(chosen).reports()


def _ranks_on_these_cores() -> int:
    """Ranks of this host that may run on the same cores as this one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    local = (socket.gethostname(), cores)
    return gather_objects([local]).count(local)


def _kept_place(texts: Sequence[str], vocabulary: str) -> Path | None:
    if not isinstance(texts, ReportTexts) or texts.manifest.key is None:
        return None
    folder = cache_folder(texts.manifest.path)
    return None if folder is None else kept_file(folder, texts.manifest.key, vocabulary)
