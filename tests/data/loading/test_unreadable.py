"""Volumes that cannot be read in training: replaced, logged, counted; past the share the run ends with the list."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from ctx_distill.commands.main import main
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.loading.unreadable import SetAside
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.errors import InputError

SPEC = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(24, 32, 32))


@pytest.fixture
def data(cohort: Path, tmp_path: Path) -> Path:
    """The cohort, to spoil."""
    shutil.copytree(cohort, tmp_path / "data")
    return tmp_path / "data"


def spoil(data: Path, count: int) -> list[str]:
    """Cut the first training scans short; their names."""
    frame = pd.read_csv(data / "ct.csv", dtype=str)
    paths = [data / path for path in frame.loc[frame["split"] == "train", "image_path"]][:count]
    for path in paths:
        path.write_bytes(path.read_bytes()[:600])
    return [path.name for path in paths]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_it_is_replaced_by_the_next_that_can_be_read(data: Path, workers: int) -> None:
    names = spoil(data, 2)
    module = CTDataModule(str(data / "ct.csv"), SPEC, batch_size=1, num_workers=workers, cache_gb=0.0)
    rows = module.training_rows()
    order = [int(rows.frame.index[i]) for i in module.order(rows)]
    readable = [row for row in rows.frame.index if rows.image_file(int(row)).name not in names]
    seen, told = [], {}
    for batch in module.train_dataloader():
        assert torch.isfinite(batch.volume).all()
        seen += batch.row.tolist()
        told |= dict(batch.unreadable)
    for asked, got in zip(order, seen, strict=True):
        # the rows are in the manifest's order, so that the next readable one is the least above it
        assert got == (asked if asked in readable else min(row for row in readable if row > asked))
    assert {rows.image_file(row).name for row in told} == set(names)
    assert all("truncated" in reason for reason in told.values())


def test_a_file_that_vanishes_in_mid_run(data: Path) -> None:
    module = CTDataModule(str(data / "ct.csv"), SPEC, batch_size=1, cache_gb=0.0)
    loader = module.train_dataloader()
    rows = module.training_rows()
    seen, told = [], {}
    for number, batch in enumerate(loader):
        if number == 1:
            gone = rows.image_file(int(rows.frame.index[list(module.order(rows))[4]]))
            gone.unlink()
        seen += batch.row.tolist()
        told |= dict(batch.unreadable)
    assert len(seen) == len(rows)
    assert [rows.image_file(row) for row in told] == [gone]
    assert "no such file or folder" in next(iter(told.values()))


def test_validation_and_prediction_replace_nothing(data: Path) -> None:
    spoil(data, 1)
    module = CTDataModule(str(data / "ct.csv"), SPEC, cache_gb=0.0)
    with pytest.raises(InputError, match="truncated"):
        list(module.loader(module.manifest.split("train")))


def test_past_the_share_the_list_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    aside = SetAside(rows=200, max_share=0.01)
    with caplog.at_level(logging.WARNING):
        aside.add([(3, "a.nii.gz: truncated")], tmp_path)
        aside.add([(3, "a.nii.gz: truncated"), (9, "b.nii.gz: empty")], tmp_path)
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "a.nii.gz: truncated",
        "b.nii.gz: empty",
    ]
    assert (tmp_path / "set_aside.csv").read_text() == "row,reason\n3,a.nii.gz: truncated\n9,b.nii.gz: empty\n"
    with pytest.raises(
        InputError, match=r"3 of 200 training volumes \(1.5%\) cannot be read; at most 1.0%(.|\n)*c.nii.gz"
    ):
        aside.add([(11, "c.nii.gz: NaN")], tmp_path)


def test_none_can_be_read(data: Path) -> None:
    spoil(data, 100)
    module = CTDataModule(str(data / "ct.csv"), SPEC, cache_gb=0.0, unreadable_share=1.0)
    with pytest.raises(InputError, match=r"none of .* images can be read"):
        next(iter(module.train_dataloader()))


@pytest.mark.full
def test_a_whole_stage_goes_on_or_stops(
    data: Path, tmp_path: Path, tiny_preset: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = spoil(data, 1)
    command = ["align", "--data", str(data), "--preset", str(tiny_preset)]
    for stage in ("expert", "index", "distill"):
        shutil.copytree(finished_run / stage, tmp_path / "run" / stage)
    shutil.copy(finished_run / "run.json", tmp_path / "run")
    assert main([*command, "--run", str(tmp_path / "run")]) == 2
    assert "may be unreadable (data.init_args.unreadable_share)" in capsys.readouterr().err
    assert main([*command, "--run", str(tmp_path / "run"), "--data.init_args.unreadable_share=0.2"]) == 0
    metrics = (tmp_path / "run/align/metrics.json").read_text()
    assert '"unreadable_set_aside": 1' in metrics
    listed = list((tmp_path / "run/align").rglob("set_aside.csv"))
    assert len(listed) == 1
    assert names[0] in listed[0].read_text()
