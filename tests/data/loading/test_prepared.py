"""Prepared volumes: the same tensors as from the scans, bit for bit, and never another scan's or half of one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctx_distill.commands.main import main
from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.loading import prepared as prepared_module
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.loading.prepared import PreparedFolder
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.errors import InputError
from ctx_distill.runs.prepare_volumes import _prepare_one, array_part, preset_volume

SPEC = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(24, 32, 32), window=(-1000.0, 600.0), stored="int16")


@pytest.fixture
def scans(cohort: Path, tmp_path: Path) -> list[tuple[str, ScanFile]]:
    manifest = read_manifest(cohort / "ct.csv")
    rows = list(manifest.frame.index)[:3]
    found = [(str(manifest.frame.at[row, "image_id"]), manifest.scan_file(int(row))) for row in rows]
    return [(name, ScanFile(Path(shutil.copy(scan.path, tmp_path / scan.path.name)))) for name, scan in found]


def modules(cohort: Path, folder: Path, **more: int) -> tuple[CTDataModule, CTDataModule]:
    """On the scans, and on the prepared folder."""
    raw = CTDataModule(str(cohort / "ct.csv"), SPEC, batch_size=4, projection=True)
    unrounded = VolumeSpec(spacing=SPEC.spacing, shape=SPEC.shape, window=SPEC.window)
    made = CTDataModule(
        str(cohort / "ct.csv"), unrounded, batch_size=4, projection=True, prepared=str(folder), num_workers=more.get("workers", 0)
    )  # fmt: skip
    return raw, made


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_either_form_alike_bit_for_bit(cohort: Path, tmp_path: Path, workers: int) -> None:
    folder = PreparedFolder.create(tmp_path / "out", SPEC, projection=True)
    manifest = read_manifest(cohort / "ct.csv")
    for row in manifest.frame.index:
        folder.write(str(manifest.frame.at[row, "image_id"]), manifest.scan_file(int(row)))
    raw, made = modules(cohort, tmp_path / "out", workers=workers)
    assert made.volume == raw.volume
    count = 0
    for one, other in zip(raw.train_dataloader(), made.train_dataloader(), strict=True):
        assert torch.equal(one.volume, other.volume)
        assert other.volume.is_contiguous()
        assert other.volume.dtype == torch.float32
        assert torch.equal(one.projection, other.projection)
        assert torch.equal(one.row, other.row)
        count += 1
    assert count >= 2


def test_the_command_goes_on_lists_what_failed_and_keeps_the_rest(
    cohort: Path, tmp_path: Path, tiny_preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(cohort / "ct", data / "ct")
    shutil.copy(cohort / "ct.csv", data)
    images = sorted((data / "ct").glob("*.nii.gz"))
    images[0].write_bytes(images[0].read_bytes()[:500])
    command = ["prepare", str(data / "ct.csv"), str(tmp_path / "out"), "--preset", str(tiny_preset), "--workers", "1"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"{len(images) - 1} prepared, 0 already there, 1 failed, of {len(images)}" in told
    assert images[0].name in (tmp_path / "out" / "failed.0.csv").read_text()
    shutil.copy(cohort / "ct" / images[0].name, images[0])
    assert main(command) == 0
    assert f"1 prepared, {len(images) - 1} already there, 0 failed" in capsys.readouterr().out
    assert not (tmp_path / "out" / "failed.0.csv").exists()
    assert main([*command, "--array", "0/0"]) == 2


def test_parts_of_an_array_are_disjoint_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [array_part(text) for text in ("0/3", "2/3", None)] == [(0, 3), (2, 3), (0, 1)]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    assert array_part(None) == (2, 4)
    for wrong in ("3/3", "x/2", "1", "-1/2"):
        with pytest.raises(InputError, match="expected i/n"):
            array_part(wrong)


@pytest.mark.full
def test_tasks_of_an_array_write_one_folder_at_once(cohort: Path, tmp_path: Path, tiny_preset: Path) -> None:
    """Three tasks started together, as SLURM starts an array 4-6: together they prepare each image once."""
    command = [sys.executable, "-m", "ctx_distill", "prepare", str(cohort / "ct.csv"), str(tmp_path / "out"),
               "--preset", str(tiny_preset), "--workers", "1"]  # fmt: skip
    tasks = []
    for number in (4, 5, 6):
        names = {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_COUNT": 3, "SLURM_ARRAY_TASK_MIN": 4}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        tasks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    told = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0]
    counts = [re.search(r"(\d+) prepared, 0 already there, 0 failed", text) for text in told]
    manifest = read_manifest(cohort / "ct.csv")
    assert sum(int(count.group(1)) for count in counts if count) == len(manifest)
    folder = PreparedFolder.open(tmp_path / "out", *preset_volume(str(tiny_preset)))
    for row in manifest.frame.index:
        assert folder.is_complete(str(manifest.frame.at[row, "image_id"]), manifest.scan_file(int(row)))


def test_another_spec_source_or_image_and_damage_are_refused(tmp_path: Path, scans: list[tuple[str, ScanFile]]) -> None:
    name, path = scans[0]
    folder = PreparedFolder.create(tmp_path / "out", SPEC, projection=False, preset="mine")
    folder.write(name, path)
    assert folder.is_complete(name, path)
    other = VolumeSpec(spacing=SPEC.spacing, shape=SPEC.shape, window=(-900.0, 600.0), stored="int16")
    for opening in (PreparedFolder.open, PreparedFolder.create):
        with pytest.raises(InputError, match=r"prepared with volume spec .*-1000.* the run uses .*-900"):
            opening(tmp_path / "out", other, projection=False)
    with pytest.raises(InputError, match="projections of version None"):
        PreparedFolder.open(tmp_path / "out", SPEC, projection=True)
    with pytest.raises(InputError, match=r"no prepared.json; prepare the folder first"):
        PreparedFolder.open(tmp_path, SPEC, projection=False)
    fresh = PreparedFolder.open(tmp_path / "out", SPEC, projection=False)
    with pytest.raises(InputError, match="is not prepared"):
        fresh.read(scans[1][0], scans[1][1])
    with pytest.raises(InputError, match=r"source \(bytes, time\)"):
        fresh.read(name, scans[1][1])
    item = next((tmp_path / "out" / "items").rglob("*.json"))
    told = item.read_text()
    projected = PreparedFolder(tmp_path / "out", SPEC, projection=True)
    with pytest.raises(InputError, match=r"projection version None, but .* has 1"):
        projected.read(name, path)
    assert json.loads(told)["preset"] == "mine"
    stored = next((tmp_path / "out" / "items").rglob("*.npy"))
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(InputError, match="checksum mismatch, the file is damaged"):
        fresh.read(name, path)
    stored.write_bytes(content[:1000])
    with pytest.raises(InputError, match="cannot read the file"):
        fresh.read(name, path)
    assert not fresh.is_complete(name, path)
    fresh.write(name, path)
    assert fresh.is_complete(name, path)


def test_a_pickle_in_place_of_a_volume_is_refused(tmp_path: Path, scans: list[tuple[str, ScanFile]]) -> None:
    name, path = scans[0]
    folder = PreparedFolder.create(tmp_path / "out", SPEC, projection=False)
    folder.write(name, path)
    stored = next((tmp_path / "out" / "items").rglob("*.npy"))
    np.save(stored, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot read the file"):
        PreparedFolder.open(tmp_path / "out", SPEC, projection=False).read(name, path)


def test_a_full_disk_leaves_what_was_written_and_nothing_by_halves(
    tmp_path: Path, scans: list[tuple[str, ScanFile]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PreparedFolder.create(tmp_path / "out", SPEC, projection=True)
    assert _prepare_one(folder, scans[0]) == "prepared"
    before = sorted((tmp_path / "out").rglob("*"))
    written = prepared_module.write_bytes

    def full(path: Path, content: bytes | memoryview) -> None:
        if path.name.endswith("projection.npy"):
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, content)

    monkeypatch.setattr(prepared_module, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device"):
        _prepare_one(folder, scans[1])
    assert folder.is_complete(*scans[0])
    assert not folder.is_complete(*scans[1])
    monkeypatch.undo()
    assert [_prepare_one(folder, scan) for scan in scans] == ["kept", "prepared", "prepared"]
    assert {json.loads(p.read_text())["image_id"] for p in (tmp_path / "out" / "items").rglob("*.json")} == {
        name for name, _ in scans
    }
    assert set(before) < set((tmp_path / "out").rglob("*"))
