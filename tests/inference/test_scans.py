"""Which scans a path names."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.inference.scans import find_scans

DICOM = bytes(128) + b"DICM"


def test_a_tree_of_all_kinds(tmp_path: Path) -> None:
    for place, content in {
        "b.nii.gz": b"", "p1/ct/IM0001": DICOM, "p1/ct/IM0002": DICOM, "p2/slice.dcm": b"", "p2/deep/c.mha": b"",
        "notes.txt": b"no scan", ".hidden/d.nii": b"", "p3/readme": b"short",
    }.items():  # fmt: skip
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = find_scans(tmp_path)
    assert [scan.name for scan in found] == ["b.nii.gz", "p1/ct", "p2"]  # what lies in a folder of slices is its own
    assert [scan.file.path for scan in found] == [tmp_path / scan.name for scan in found]
    (series,) = find_scans(tmp_path / "p1" / "ct")
    assert (series.name, series.file.path) == ("ct", tmp_path / "p1" / "ct")
    assert len({scan.slug for scan in found}) == 3
    assert all("/" not in scan.slug for scan in found)
