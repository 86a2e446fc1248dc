"""What the data modules serve: typed batches, a shuffle that is a function of seed and epoch, texts where needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.loading.cache import TensorCache
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.loading.order import EpochShuffle
from ctx_distill.data.transforms.model_volume import VolumeSpec, load_ct
from ctx_distill.data.transforms.projection import PROJECTION_VERSION, square_projection
from ctx_distill.types import CTBatch

SPEC = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(24, 32, 32))


def test_a_batch_holds_the_volumes_texts_and_labels_of_its_rows(cohort: Path) -> None:
    module = CTDataModule(str(cohort / "ct.csv"), SPEC, batch_size=4, with_labels=True)
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, CTBatch)
    table = pd.read_csv(cohort / "ct.csv", dtype=str, keep_default_na=False)
    for index, row in enumerate(batch.row.tolist()):
        assert table.loc[row, "split"] == "train"
        assert torch.equal(batch.volume[index], load_ct(cohort / table.loc[row, "image_path"], SPEC))
        assert batch.report[index] == " ".join(f"{table.loc[row, 'findings']} {table.loc[row, 'impression']}".split())
        labels = [float(table.loc[row, name]) for name in table.columns if name.startswith("label:")]
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels[index].numpy(), np.array(labels, dtype=np.float32))


def test_tasks_that_must_not_see_labels_get_none(cohort: Path) -> None:
    batch = next(iter(CTDataModule(str(cohort / "ct.csv"), SPEC, batch_size=4).train_dataloader()))
    assert batch.labels is None


def test_a_batch_carries_the_scans_own_projections_where_asked(cohort: Path) -> None:
    """Out of one read of the file, kept beside the volume."""
    module = CTDataModule(str(cohort / "ct.csv"), SPEC, batch_size=4, cache_gb=0.5, projection=True)
    plain = CTDataModule(str(cohort / "ct.csv"), SPEC, batch_size=4, cache_gb=0.5)
    first, again = (next(iter(module.loader(module.manifest.split("val")))) for _ in range(2))
    without = next(iter(plain.loader(plain.manifest.split("val"))))
    assert without.projection is None
    assert torch.equal(first.volume, without.volume)
    assert torch.equal(first.projection, again.projection)
    for picture, row in zip(first.projection, first.row.tolist(), strict=True):
        assert torch.equal(picture, square_projection(read_volume(module.manifest.image_file(row))))
    assert module.describe()["projection_version"] == PROJECTION_VERSION
    assert "projection_version" not in plain.describe()


def test_tensors_made_together_are_kept_together() -> None:
    cache = TensorCache(limit_bytes=4 * 15)
    made: list[int] = []

    def make() -> tuple[torch.Tensor, ...]:
        made.append(1)
        return torch.zeros(10), torch.ones(5)

    for _ in range(2):
        volume, picture = cache.get_all(("volume", "picture"), make)
        assert (volume.sum(), picture.sum()) == (0, 5)
    assert made == [1]
    assert cache.get("volume", lambda: torch.ones(10)).sum() == 0
    assert cache.held_bytes == 60


def test_the_shuffle_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochShuffle(50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_a_study_without_text_is_left_out_where_text_is_required(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(cohort / "ct.csv", dtype=str, keep_default_na=False)
    first = table.index[table["split"] == "train"][0]
    table.loc[first, ["findings", "impression"]] = ""
    (tmp_path / "ct").mkdir()
    for path in table["image_path"]:
        (tmp_path / path).write_bytes((cohort / path).read_bytes())
    table.to_csv(tmp_path / "ct.csv", index=False)
    module = CTDataModule(str(tmp_path / "ct.csv"), SPEC, text="required")
    assert int(first) not in module.training_rows().frame.index
    assert "1 of" in capsys.readouterr().out
    assert int(first) in CTDataModule(str(tmp_path / "ct.csv"), SPEC).training_rows().frame.index


def test_the_cache_keeps_within_its_limit_and_gives_back_the_same_tensor() -> None:
    cache = TensorCache(limit_bytes=2 * 4 * 10)
    made: list[int] = []

    def make(value: int) -> torch.Tensor:
        made.append(value)
        return torch.full((10,), float(value))

    for _ in range(2):
        for value in range(3):
            assert cache.get(value, lambda value=value: make(value)).tolist() == [float(value)] * 10  # type: ignore[misc]
    assert made == [0, 1, 2, 2]
    assert cache.held_bytes == 80
