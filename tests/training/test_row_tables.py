"""Tables of training rows: the same rows in memory and in a mapped file, within the limit, and in parts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.stages.align import training_reports
from ctx_distill.stages.align.training_reports import TrainingReports
from ctx_distill.training.row_tables import RowTables


def parts_of(table: Tensor) -> list[Tensor]:
    return list(table.split([3, 4, 4, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_mapped_table_holds_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    table = (torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    size = table.nbytes
    tables = RowTables((2 * size + 0.5) / 1e9, tmp_path)
    made = [tables.collect(12, parts_of(table + i)) for i in range(4)]
    assert (tables.held_bytes, tables.mapped_bytes) == (2 * size, 2 * size)
    for i, one in enumerate(made):
        assert one.dtype == dtype
        assert torch.equal(one, table + i)
        assert torch.equal(one[[3, 11, 3]], (table + i)[[3, 11, 3]])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 2
    assert not list(tmp_path.iterdir())
    del made, one
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()  # freed with the table


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*where: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    tables = RowTables(0, tmp_path)
    with pytest.warns(UserWarning, match=r"No space left.*kept in memory.*cache_gb"):
        assert torch.equal(tables.collect(2, [torch.ones(2, 3)]), torch.ones(2, 3))
    assert (tables.held_bytes, tables.mapped_bytes) == (24, 0)


class Letters:
    """Stands in for the expert: counts of letters, and how many texts it was given at once."""

    has_text = True

    def __init__(self) -> None:
        self.largest = 0

    def encode_text(self, texts: list[str]) -> Tensor:
        self.largest = max(self.largest, len(texts))
        return F.normalize(
            torch.tensor([[1.0 + text.count(letter) for letter in "aeiounst"] for text in texts]), dim=-1
        )


class Twice:
    """Stands in for a lookup."""

    largest = 0

    def look_up(self, queries: Tensor) -> dict[str, Tensor]:
        self.largest = max(self.largest, len(queries))
        return {"features": torch.cat([queries, queries], dim=1)}


@pytest.mark.parametrize("memory_gb", [0.0, 1.0])
def test_reports_are_embedded_and_looked_up_in_parts(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_gb: float
) -> None:
    train = read_manifest(cohort / "ct.csv").split("train")
    monkeypatch.setattr(training_reports, "PART", 5)
    expert: Any = Letters()
    lookup: Any = Twice()
    reports = TrainingReports(train, expert, expert, RowTables(memory_gb, tmp_path))
    texts = [train.report(row) for row in train.frame.index]
    expected = Letters().encode_text(texts)
    assert torch.equal(reports.embeddings, expected)
    assert torch.equal(reports.retrieved(lookup), torch.cat([expected, expected], dim=1))
    assert expert.largest == lookup.largest == 5
    size = 3 * expected.nbytes
    assert (reports.tables.held_bytes, reports.tables.mapped_bytes) == ((size, 0) if memory_gb else (0, size))
