"""Extract the findings of many reports in parallel and cache them.

Extraction depends on the texts, the vocabulary and the rules (this package), so the name of the cache file is a SHA-256 of
all three. Files are written under a temporary name and renamed, so several processes may write the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctx_distill.files import hash_file, hash_json, write_bytes
from ctx_distill.parallel import in_processes, usable_cores
from ctx_distill.text.extractor import extract_many, load_vocabulary

FEWEST_FOR_PROCESSES = 20_000
"""Min number of reports for worker processes, which take seconds to start; a core processes thousands per second."""
_PART = 2_000
_NOT_MENTIONED = 2


def extract_in_processes(texts: Sequence[str], vocabulary: str, workers: int | None = None) -> NDArray[np.float32]:
    """Return the result of `extract_many`, bit-identical, using worker processes for many texts.

    Args:
        texts: N reports; parts are created when a process is ready for them.
        vocabulary: name or YAML file.
        workers: number of processes; None uses one per usable core.

    Returns:
        (N, F) float32, see `extract_many`.
    """
    workers = usable_cores() if workers is None else workers
    if workers < 2 or len(texts) < FEWEST_FOR_PROCESSES:
        return extract_in_parts(texts, vocabulary)
    findings = np.empty((len(texts), len(load_vocabulary(vocabulary).findings)), dtype=np.float32)
    starts = range(0, len(texts), _PART)
    parts = ((start, texts[start : start + _PART]) for start in starts)
    read = partial(_read_part, vocabulary)
    for (start, part), values in in_processes("extracting findings", read, parts, len(starts), workers):
        findings[start : start + len(part)] = values
    return findings


def extract_in_parts(texts: Sequence[str], vocabulary: str) -> NDArray[np.float32]:
    """Run `extract_many` in this process on parts of the texts."""
    loaded = load_vocabulary(vocabulary)
    findings = np.empty((len(texts), len(loaded.findings)), dtype=np.float32)
    for start in range(0, len(texts), _PART):
        findings[start : start + _PART] = extract_many(texts[start : start + _PART], loaded)
    return findings


def _read_part(vocabulary: str, part: tuple[int, Sequence[str]]) -> NDArray[np.float32]:
    return extract_many(part[1], load_vocabulary(vocabulary))


@cache
def rules_hash(vocabulary: str) -> str:
    """Return the SHA-256 (hex) of the rules and the vocabulary's content."""
    package = Path(__file__).parent
    rules = {path.name: hash_file(path) for path in sorted([*package.glob("*.py"), *package.glob("vocabularies/*")])}
    return hash_json([rules, repr(load_vocabulary(vocabulary))])


def kept_file(folder: Path, texts_key: str, vocabulary: str) -> Path:
    """Return the path of the cache file for the findings of texts.

    Args:
        folder: cache folder.
        texts_key: a hash of the texts and their order.
        vocabulary: name or YAML file.
    """
    return folder / f"findings-{hash_json([texts_key, rules_hash(vocabulary)])[:32]}.npy"


def load_kept(path: Path, rows: int, columns: int) -> NDArray[np.float32] | None:
    """Load cached findings (rows, columns) as from `extract_many`; None if the file is missing or corrupt."""
    try:
        small = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if small.shape != (rows, columns) or small.dtype != np.int8:
        return None
    findings: NDArray[np.float32] = small.astype(np.float32)
    findings[small == _NOT_MENTIONED] = np.nan
    return findings


def keep(path: Path, findings: NDArray[np.float32]) -> None:
    """Cache findings as int8; write errors are ignored."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.where(np.isnan(findings), _NOT_MENTIONED, findings).astype(np.int8), allow_pickle=False)
    try:
        write_bytes(path, buffer.getbuffer())
    except OSError:
        return
