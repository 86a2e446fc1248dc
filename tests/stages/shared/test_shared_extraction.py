"""Findings of many reports: in processes, across ranks and from the kept file they are those of `extract_many`, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ctx_distill.data.manifests.column_reader as table
import ctx_distill.stages.shared.shared_extraction as shared
import ctx_distill.text.parallel_extraction as extraction
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.text.extractor import extract_many, load_vocabulary

ROWS = 260
SENTENCES = (
    "There is a pleural effusion on the left.", "No pleural effusion, no pneumothorax.", "Heart size is normal.",
    "A nodule of 5 mm. in the right upper lobe cannot be excluded.", "The patient moved.", "Emphysema is seen.",
)  # fmt: skip


def write(folder: Path) -> Path:
    draw = random.Random(0)
    (folder / "a.png").write_bytes(b"\x89PNG")
    rows = [
        {"study_id": f"s{i}", "patient_id": f"p{i}", "split": "train" if i % 7 else "val", "image_path": "a.png",
         "findings": " ".join(draw.sample(SENTENCES, 3)) if i % 5 else "", "impression": draw.choice(["", *SENTENCES])}
        for i in range(ROWS)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "ct.csv", index=False)
    return folder / "ct.csv"


def train_rows(path: str) -> Manifest:
    table.SMALLEST_CACHED = 1
    return read_manifest(Path(path)).split("train")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setattr(table, "SMALLEST_CACHED", 1)
    return read_manifest(write(tmp_path)).split("train")


def expected(train: Manifest) -> np.ndarray:
    return extract_many([train.report(int(row)) for row in train.rows], load_vocabulary("chexpert"))


def test_kept_and_loaded(train: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected(train)
    assert np.isnan(wanted).any()
    assert {-1.0, 0.0, 1.0} <= set(np.unique(wanted[~np.isnan(wanted)]))
    assert shared.extract_shared(train.reports(), "chexpert").tobytes() == wanted.tobytes()
    with monkeypatch.context() as patch:
        patch.setattr(shared, "extract_in_processes", None)  # not called again
        assert shared.extract_shared(train.reports(), "chexpert").tobytes() == wanted.tobytes()
    kept = next((train.path.parent / ".ctx-distill-cache").glob("findings-*.npy"))
    kept.write_bytes(kept.read_bytes()[:-5])
    assert shared.extract_shared(train.reports(), "chexpert").tobytes() == wanted.tobytes()
    assert shared.extract_shared(train.reports(), "ct-rate").shape[1] == len(load_vocabulary("ct-rate").findings)
    other = shared.extract_shared(train.where(np.arange(len(train)) < 9).reports(), "chexpert")
    assert other.tobytes() == wanted[:9].tobytes()


def test_other_rules_and_vocabularies_have_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = extraction.kept_file(tmp_path, "texts", "chexpert")
    assert one != extraction.kept_file(tmp_path, "texts", "ct-rate")
    assert one != extraction.kept_file(tmp_path, "others", "chexpert")
    extraction.rules_hash.cache_clear()
    monkeypatch.setattr(extraction, "hash_file", lambda path: "changed")
    assert one != extraction.kept_file(tmp_path, "texts", "chexpert")
    extraction.rules_hash.cache_clear()


def test_in_processes(train: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "FEWEST_FOR_PROCESSES", 1)
    monkeypatch.setattr(extraction, "_PART", 40)
    found = extraction.extract_in_processes(train.reports(), "chexpert", workers=2)
    assert found.tobytes() == expected(train).tobytes()


def rank_extracts(path: str) -> dict[str, Any]:
    read: list[int] = []
    inside = extraction.extract_in_parts

    def counted(texts: Any, vocabulary: str) -> Any:
        read.append(len(texts))
        return inside(texts, vocabulary)

    extraction.extract_in_parts = counted
    smallest = table.SMALLEST_CACHED
    try:
        train = train_rows(path)
        first = shared.extract_shared(train.reports(), "chexpert")
        again = shared.extract_shared(train.reports(), "chexpert")
    finally:
        extraction.extract_in_parts, table.SMALLEST_CACHED = inside, smallest
    return {"found": torch.from_numpy(first), "again": torch.from_numpy(again), "read": read}


@pytest.mark.ddp
def test_ranks_share_the_work(tmp_path: Path, pool: Callable[[int], Any], train: Manifest) -> None:
    wanted = expected(train)
    results = pool(2).run(__file__, "rank_extracts", {"path": str(tmp_path / "ct.csv")})
    for result in results:
        assert result["found"].numpy().tobytes() == wanted.tobytes()
        assert result["again"].numpy().tobytes() == wanted.tobytes()
        assert len(result["read"]) == 1
    assert sum(result["read"][0] for result in results) == len(train)
