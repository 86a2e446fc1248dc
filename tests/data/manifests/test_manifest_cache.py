"""A large manifest is read once and mapped from its cache: the same rows, texts and fingerprints as the row-by-row reader's."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

import numpy as np
import pytest

import ctx_distill.data.manifests.column_reader as table
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.data.manifests.row_reader import read_by_rows
from ctx_distill.errors import InputError

ROWS = 300


def write(path: Path, **changes: str) -> Path:
    """A manifest with spaces, line breaks, letters beyond ASCII, blanks, labels and numbers; `changes` go into row 200."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        (path.parent / name).write_bytes(b"\x89PNG more")
    rows = []
    for i in range(ROWS):
        rows.append({
            "study_id": f" s{i // 2}", "patient_id": f"p{i // 4}", "split": ("train", "val", "test")[i // 4 % 3],
            "image_path": "ab"[i % 2] + ".png", "findings": f"Größe {i}\n mm, \"quoted\"" if i % 3 else "  ",
            "impression": "x  \u00a0y" if i % 5 else "", "image_id": f"i{i}", "source": "one" if i % 2 else "",
            "slope": "1.5", "intercept": "-2", "label:a": "1.0", "label:b b": ("", "0", "-1")[i % 3], "other": "out",
        })  # fmt: skip
    rows[200] |= changes
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SMALLEST_CACHED", 1)


def same(one: Manifest, other: Manifest) -> None:
    assert one.fingerprint == other.fingerprint
    assert one.finding_names == other.finding_names
    assert list(one.frame.columns) == list(other.frame.columns)
    for name in other.frame.columns:
        np.testing.assert_array_equal(one.frame[name].to_numpy(), other.frame[name].to_numpy(), err_msg=name)
    np.testing.assert_array_equal(one.rows, other.frame.index)
    np.testing.assert_array_equal(one.labels(), other.labels())
    np.testing.assert_array_equal(one.study_codes(), other.study_codes())
    texts = [other.report(row) for row in other.frame.index]
    assert list(one.reports()) == texts
    assert one.reports()[3] == texts[3]
    assert one.reports()[2:7] == texts[2:7]
    assert one.has_report().tolist() == [bool(text) for text in texts]


def test_from_the_cache_as_row_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "ct.csv")
    slow = Manifest(path, *read_by_rows(path, check_images=True))
    for _ in range(2):
        fast = read_manifest(path)
        same(fast, slow)
        same(fast.split("train"), slow.split("train"))
        odd = np.arange(len(fast.split("val", "test"))) % 2 == 1
        same(fast.split("val", "test").where(odd), slow.split("val", "test").where(odd))
    folder = path.parent / ".ctx-distill-cache"
    assert len(list(folder.glob("*.arrow"))) == 1
    assert not list(folder.glob(".*part"))
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


def test_another_content_has_another_cache_and_a_corrupt_one_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "ct.csv")
    read_manifest(path)
    write(path, findings="Changed.")
    assert read_manifest(path).frame.at[200, "findings"] == "Changed."
    files = list((tmp_path / ".ctx-distill-cache").glob("*.arrow"))
    assert len(files) == 1  # that of the former content is deleted
    for file in files:
        file.write_bytes(b"not Arrow")
    assert read_manifest(path).frame.at[200, "findings"] == "Changed."


@pytest.mark.parametrize(
    "change",
    [
        {"split": "dev"}, {"study_id": ""}, {"image_id": "i3"}, {"patient_id": "p0"}, {"image_path": "../a.png"},
        {"image_path": "/a.png"}, {"image_path": "gone.png"}, {"slope": "0"}, {"intercept": ""}, {"label:a": "2"},
    ],
)  # fmt: skip
def test_faults_have_the_messages_of_the_row_by_row_reader_and_are_not_cached(
    tmp_path: Path, change: dict[str, str]
) -> None:
    path = write(tmp_path / "ct.csv", **change)
    with pytest.raises(InputError) as slow:
        read_by_rows(path, check_images=True)
    for _ in range(2):
        with pytest.raises(InputError) as fast:
            read_manifest(path)
        assert str(fast.value) == str(slow.value)
    if change["image_path"] != "gone.png" if "image_path" in change else True:
        assert not list((tmp_path / ".ctx-distill-cache").glob("*.arrow"))


def test_an_image_that_has_gone_since_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "ct.csv")
    read_manifest(path)
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(path)


def test_the_folder_can_be_chosen_and_need_not_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data" / "ct.csv")
    monkeypatch.setenv(table.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    read_manifest(path)
    assert len(list((tmp_path / "elsewhere").glob("*.arrow"))) == 1
    assert not (tmp_path / "data" / ".ctx-distill-cache").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(table.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    assert len(read_manifest(path)) == ROWS


def test_parquet_is_cached_too(tmp_path: Path) -> None:
    frame = read_by_rows(write(tmp_path / "ct.csv"), check_images=True)[0].drop(columns="study_code")
    frame = frame.astype({"slope": str, "intercept": str})
    frame.to_parquet(tmp_path / "ct.parquet")
    slow = Manifest(tmp_path / "ct.parquet", *read_by_rows(tmp_path / "ct.parquet", check_images=True))
    for _ in range(2):
        fast = read_manifest(tmp_path / "ct.parquet")
        assert fast.fingerprint == slow.fingerprint == read_manifest(tmp_path / "ct.csv").fingerprint


def test_asking_a_split_for_its_reports_copies_no_text(tmp_path: Path) -> None:
    import pyarrow as pa

    text = "no pleural effusion " * 500
    path = write(tmp_path / "ct.csv", findings=text)
    rows = list(csv.reader(path.open(encoding="utf-8-sig")))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([*row[:4], f"{row[4]} {text}", *row[5:]] for row in rows[1:])])
    part = read_manifest(path).split("train", "val")
    counted, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(counted)
    try:
        told, texts = part.has_report(), part.reports()
        assert counted.max_memory() < len(part) * len(text) / 20
    finally:
        pa.set_memory_pool(before)
    assert told.all()
    assert len(texts) == len(part) == 200
    assert texts[7] == part.report(int(part.rows[7]))


@pytest.mark.parametrize("step", [1, 3, 10])
def test_the_reports_of_rows_near_each_other_and_far_apart(tmp_path: Path, step: int) -> None:
    manifest = read_manifest(write(tmp_path / "ct.csv"))
    part = manifest.where(np.arange(ROWS) % step == 0)
    assert list(part.reports()) == [manifest.report(row) for row in range(0, ROWS, step)]
    assert part.reports()[4:4] == []
    nothing = manifest.where(np.zeros(ROWS, dtype=bool))
    assert list(nothing.reports()) == nothing.has_report().tolist() == []


def test_reading_all_text_once_does_not_keep_it_in_memory(tmp_path: Path) -> None:
    """The resident pages of the cache file, as the kernel counts them, after the fingerprint and after all reports."""
    text = "x" * 100_000
    path = write(tmp_path / "m.csv", findings=text)
    lines = path.read_text(encoding="utf-8-sig").replace("Größe", text).encode()
    path.write_bytes(lines)
    manifest = read_manifest(path)
    resident_mb = {"read": _resident_mb(".arrow")}
    assert manifest.fingerprint
    resident_mb["fingerprint"] = _resident_mb(".arrow")
    assert sum(len(part) for part in manifest.reports()) > 19e6
    resident_mb["reports"] = _resident_mb(".arrow")
    assert max(resident_mb.values()) < 5, resident_mb


def _resident_mb(ending: str) -> float:
    """MB of this process's resident memory that are pages of files whose name ends so."""
    mapped, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            mapped = words[-1].endswith(ending)
        elif words[0] == "Rss:" and mapped:
            total += int(words[1])
    return total / 1024
