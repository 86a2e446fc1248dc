"""Features of manifest rows: the same bits from memory, from disk or computed again, within the limits, after any fault."""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ctx_distill import distributed
from ctx_distill.errors import InputError
from ctx_distill.training.row_features import CacheSettings, RowFeatures
from ctx_distill.training.row_scratch import RowScratch

ROWS = list(range(40))
SHAPE = (6, 64)
ROW_GB = 6 * 64 * 4 / 1e9


def feature(row: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(row)).to(dtype)


def trainer_of(folder: Path) -> Any:
    """What `open_disk` asks of a trainer: all ranks of the tests' pool are on one machine."""
    return SimpleNamespace(local_rank=distributed.rank(), node_rank=0, default_root_dir=str(folder))


def ask(features: RowFeatures, rows: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[int]]:
    """The features of rows, asked in batches of four, and the rows that were computed."""
    computed: list[int] = []

    def compute(rows: list[int]) -> Tensor:
        (row,) = rows
        computed.append(row)
        return feature(row, dtype)[None]

    batches = [rows[at : at + 4] for at in range(0, len(rows), 4)]
    return torch.cat([features.get(batch, lambda new, b=batch: compute(b[new])) for batch in batches]), computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("in_memory", "on_disk"), [(40, 0), (0, 40), (0, 0), (7, 40), (7, 11), (0, 3)], ids=lambda n: str(n)
)
def test_the_same_bits_wherever_a_row_was_kept(
    tmp_path: Path, dtype: torch.dtype, in_memory: int, on_disk: int
) -> None:
    size = 6 * 64 * dtype.itemsize
    header = 4096 if on_disk else 0
    features = RowFeatures(
        CacheSettings((in_memory * size + 0.5) / 1e9, (header + on_disk * size + bool(on_disk) / 2) / 1e9)
    )
    features.open_disk(trainer_of(tmp_path), ROWS[::-1])
    expected = torch.stack([feature(row, dtype) for row in ROWS])
    orders = [ROWS, ROWS[::-1], ROWS[::3] + ROWS[1::3] + ROWS[2::3]]
    for epoch, order in enumerate(orders):
        found, computed = ask(features, order, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected[order])
        if epoch == 0:
            assert computed == order
        else:  # the first in_memory rows in memory; of the others those that have a place on disk: the last ones here
            kept = set(ROWS[:in_memory]) | set(ROWS[::-1][:on_disk])
            assert computed == [row for row in order if row not in kept]
    assert features._memory.held_bytes <= in_memory * size
    features.close()


def test_the_file_is_gone_at_once_and_takes_what_the_limit_allows(tmp_path: Path) -> None:
    (tmp_path / "row-features-0123-0").write_bytes(b"of a process that was killed while it opened its file")
    features = RowFeatures(CacheSettings(0, (4096 + 10.5 * ROW_GB * 1e9) / 1e9))
    features.open_disk(trainer_of(tmp_path), ROWS)
    assert not list(tmp_path.iterdir())  # a killed process leaves nothing
    ask(features, ROWS)
    assert features._scratch is not None
    taken = os.fstat(features._scratch._file.fileno())
    assert taken.st_size == 4096 + 10 * 6 * 64 * 4
    assert taken.st_blocks * 512 <= 4096 + 11 * 6 * 64 * 4 + 4096
    assert features._scratch.stored_rows() == 10
    assert "1,536 bytes per row; 0 rows (0.0 MB) in this rank's memory, 10 " in features.describe()
    assert "30 recomputed on each use" in features.describe()
    features.close()
    assert ask(features, ROWS[:4])[1] == ROWS[:4]


def test_at_most_half_of_the_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=2 * (4096 + 5 * 6 * 64 * 4)))
    features = RowFeatures(CacheSettings(0, 100))
    features.open_disk(trainer_of(tmp_path), ROWS)
    ask(features, ROWS)
    assert ask(features, ROWS)[1] == ROWS[5:]


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond a size, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_gives_the_space_back_and_the_same_bits(
    tmp_path: Path, largest_file: Callable[[int], None]
) -> None:
    features = RowFeatures(CacheSettings(0, 1))
    features.open_disk(trainer_of(tmp_path), ROWS)
    assert features._scratch is not None
    descriptor = os.dup(features._scratch._file.fileno())
    largest_file(4096 + 12 * 6 * 64 * 4 + 100)  # the thirteenth row is cut
    with pytest.warns(UserWarning, match=r"File too large.*the result is the same.*cache\.folder"):
        found, _ = ask(features, ROWS)
    assert os.fstat(descriptor).st_size == 0
    os.close(descriptor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        again, computed = ask(features, ROWS)
    expected = torch.stack([feature(row) for row in ROWS])
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert computed == ROWS


@pytest.mark.parametrize("damage", ["zeros", "cut", "flipped"])
def test_a_damaged_record_is_computed_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows"
    RowScratch.create(path, 4)
    scratch = RowScratch(path, [5, 6, 7, 8], 10**6)
    for row in (5, 6, 7):
        assert scratch.write(row, feature(row))
    assert scratch.read(8) is None
    assert scratch.read(9) is None
    start, size = 4096 + 6 * 64 * 4, 6 * 64 * 4
    with path.open("r+b") as file:
        if damage == "cut":
            file.truncate(start + size - 4)
        else:
            file.seek(start + 40)
            byte = file.read(1)
            file.seek(start + 40)
            file.write(bytes(800) if damage == "zeros" else bytes([byte[0] ^ 4]))
    assert scratch.read(6) is None
    five = scratch.read(5)
    assert five is not None
    assert torch.equal(five, feature(5))
    assert not scratch.write(8, feature(8)[:3])  # another shape has no place
    assert scratch.write(6, feature(6))
    again = scratch.read(6)
    assert again is not None
    assert torch.equal(again, feature(6))


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    features = RowFeatures(CacheSettings(0, 1, str(tmp_path / "file" / "below")))
    with pytest.warns(UserWarning, match=r"the result is the same.*cache\.disk_gb=0"):
        features.open_disk(trainer_of(tmp_path), ROWS)
    assert torch.equal(ask(features, ROWS)[0], torch.stack([feature(row) for row in ROWS]))


def test_negative_limits_are_refused() -> None:
    with pytest.raises(InputError, match=r"memory_gb is -1"):
        CacheSettings(memory_gb=-1)


def test_a_view_does_not_keep_what_it_is_a_view_of() -> None:
    features = RowFeatures(CacheSettings(1, 0))
    features.get([3], lambda new: torch.zeros(1, 100, 8)[:, 0])
    assert features._memory.get(3, lambda: torch.zeros(0)).untyped_storage().nbytes() == 32


def ranks_share_a_file(folder: str) -> dict[str, Any]:
    """Rank 0 asks for all rows, then rank 1 does; both then have another machine's word that the disk is full."""
    features = RowFeatures(CacheSettings(0, 1))
    features.open_disk(trainer_of(Path(folder)), ROWS)
    mine: dict[str, Any] = {}
    for asking in (0, 1):
        if distributed.rank() == asking:
            mine["features"], mine["computed"] = ask(features, ROWS)
        distributed.barrier()
    assert features._scratch is not None
    mine["stored"] = features._scratch.stored_rows()
    distributed.barrier()
    if distributed.rank() == 0:  # as a write that failed leaves it
        os.ftruncate(features._scratch._file.fileno(), 0)
    distributed.barrier()
    again, computed = ask(features, ROWS)
    return mine | {"again": again, "computed_again": computed, "closed": features._scratch._file.closed}


@pytest.mark.ddp
def test_ranks_of_one_machine_share_one_file(tmp_path: Path, pool: Callable[[int], Any]) -> None:
    first, second = pool(2).run(__file__, "ranks_share_a_file", {"folder": str(tmp_path)})
    expected = torch.stack([feature(row) for row in ROWS])
    for rank in (first, second):
        assert torch.equal(rank["features"], expected)
        assert torch.equal(rank["again"], expected)
        assert rank["stored"] == len(ROWS)
        assert rank["computed_again"] == ROWS
        assert rank["closed"]
    assert first["computed"] == ROWS
    assert second["computed"] == ROWS[:1]  # its first row tells it the shape
    assert not list(tmp_path.iterdir())
