"""What the explorer takes and what it refuses, before anything of it is read as a scan."""

from __future__ import annotations

import gzip
import io
import resource
import stat
import struct
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from explorer_scans import dicom_zip, nifti_bytes

from ctx_distill.data.io.volume import read_volume
from ctx_distill.errors import InputError
from ctx_distill.explorer.limits import Limits
from ctx_distill.explorer.uploads import accept, clean_name


def take(tmp_path: Path, content: bytes, name: str, **limits: float) -> object:
    received, folder = tmp_path / "received", tmp_path / "session"
    received.write_bytes(content)
    folder.mkdir()
    return accept(received, name, folder, Limits(**limits))  # type: ignore[arg-type]


def zipped(entries: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name) if name.startswith("/") else name, content)
    return out.getvalue()


def test_nifti_and_zips_give_the_scan_that_was_sent(tmp_path: Path) -> None:
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    for number, (content, name) in enumerate(
        [
            (nifti_bytes(voxels), "a.nii.gz"),
            (gzip.decompress(nifti_bytes(voxels)), "a.nii"),
            (zipped({"study/a.nii.gz": nifti_bytes(voxels), "__MACOSX/._a": b"x"}), "a.zip"),
            (dicom_zip(voxels), "series.zip"),
        ]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        upload = take(place, content, name)
        np.testing.assert_array_equal(read_volume(upload.path).voxels, voxels)  # type: ignore[attr-defined]
        assert not (place / "received").exists()


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/abs/x", "a/../../x", "..\\..\\x", "C:\\x"])
def test_a_path_that_climbs_is_refused_and_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="leaves the archive"):
        take(tmp_path, zipped({"000.dcm": b"x", name: b"x"}), "x.zip")
    assert {p.name for p in tmp_path.rglob("*")} == {"received", "session"}


def test_a_link_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("slice.dcm")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="link"):
        take(tmp_path, out.getvalue(), "x.zip")


def test_a_bomb_stops_at_the_limit_whatever_it_declares(tmp_path: Path) -> None:
    honest = zipped({"a.dcm": bytes(30 << 20)})
    assert len(honest) < 100_000
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="declares 30 MB unpacked"):
        take(tmp_path / "a", honest, "x.zip", max_unpacked_mb=8)
    # The same with both declared sizes made small: the local header's and the directory's.
    lying = honest.replace(struct.pack("<L", 30 << 20), struct.pack("<L", 1000))
    assert lying != honest
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError):
        take(tmp_path / "b", lying, "x.zip", max_unpacked_mb=8)
    assert sum(p.stat().st_size for p in (tmp_path / "b" / "session").rglob("*") if p.is_file()) <= 9 << 20


def test_many_small_bombs_count_together(tmp_path: Path) -> None:
    content = zipped({f"{n}.dcm": bytes(1 << 20) for n in range(12)})
    with pytest.raises(InputError, match="12 MB unpacked"):
        take(tmp_path, content, "x.zip", max_unpacked_mb=8)


def test_a_gzip_bomb_is_not_unpacked_before_its_header_is_believed(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((4000, 4000, 4000))
    header.set_data_dtype(np.int16)
    with pytest.raises(InputError, match="4000 x 4000 x 4000 = 122,070 MB"):
        take(tmp_path, gzip.compress(header.binaryblock + bytes(1 << 20)), "x.nii.gz")


def test_absurd_dicom_headers_are_refused(tmp_path: Path) -> None:
    content = dicom_zip(np.zeros((3, 4, 4), np.int16), rows=60000, columns=60000)
    with pytest.raises(InputError, match="3 slices = 20,599 MB"):
        take(tmp_path, content, "x.zip")


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        (b"", "x.nii.gz", "not a supported scan"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1000), "x.nii.gz", "not a supported scan"),
        (gzip.compress(b"a letter, no scan" * 100), "x.nii.gz", "not a supported scan"),
        (b"\x1f\x8b" + b"rubbish" * 100, "x.nii.gz", "corrupt|not a supported scan"),
        (b"PK\x03\x04" + bytes(500), "x.zip", "corrupt"),
        (bytes(128) + b"DICM" + bytes(500), "x.dcm", "single DICOM"),
        (zipped({"readme.txt": b"hello"}), "x.zip", "no DICOM slices"),
        (zipped({}), "x.zip", "empty"),
        (zipped({"inner.zip": zipped({"a": b"b"})}), "x.zip", "another archive"),
        (zipped({"a.nii": b"1", "b.nii": b"2"}), "x.zip", "expected one scan"),
    ],
)
def test_junk_is_refused_in_words(tmp_path: Path, content: bytes, name: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as refusal:
        take(tmp_path, content, name)
    assert str(tmp_path) not in str(refusal.value)


def test_too_many_entries_are_refused_before_one_is_unpacked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="30 entries; expected at most 20 entries"):
        take(tmp_path, zipped({f"{n}.dcm": b"x" for n in range(30)}), "x.zip", max_files=20)
    assert not list((tmp_path / "session").iterdir())


def test_a_long_directory_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = zipped({f"{n:05d}.dcm": b"" for n in range(3000)})
    monkeypatch.setattr(zipfile, "ZipFile", None)  # would fail otherwise than by a refusal
    with pytest.raises(InputError, match="a directory of 0 MB; expected at most 20 entries"):
        take(tmp_path, many, "x.zip", max_files=20)


def test_a_zip64_is_taken_as_another(tmp_path: Path) -> None:
    out = io.BytesIO()
    voxels = np.zeros((4, 5, 6), np.int16)
    with zipfile.ZipFile(out, "w") as archive, archive.open("a.nii.gz", "w", force_zip64=True) as entry:
        entry.write(nifti_bytes(voxels))
    plain = out.getvalue()
    end = plain.rfind(b"PK\x05\x06")
    size, start = struct.unpack("<LL", plain[end + 12 : end + 20])
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    upload = take(tmp_path, plain[:end] + record + locator + last, "x.zip")
    np.testing.assert_array_equal(read_volume(upload.path).voxels, voxels)  # type: ignore[attr-defined]


def test_names_are_shown_and_never_paths() -> None:
    assert clean_name("../../a\x00b\n.nii.gz") == "ab.nii.gz"
    assert clean_name("C:\\scans\\x.zip") == "x.zip"
    assert clean_name("/") == "upload"


def test_an_encrypted_zip_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    content = bytearray(zipped({"000.dcm": b"x" * 50}, zipfile.ZIP_STORED))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # bit 0 of the flags (APPNOTE 4.4.4)
        content[content.index(signature) + at] |= 1
    with zipfile.ZipFile(io.BytesIO(content)) as archive, pytest.raises(RuntimeError, match="encrypted"):
        archive.read("000.dcm")
    with pytest.raises(InputError, match=r"x\.zip: the zip is encrypted; expected one without a password"):
        take(tmp_path, bytes(content), "x.zip")
    assert {p.name for p in tmp_path.rglob("*")} == {"received", "session"}


def test_a_full_disk_while_unpacking_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses to let a file grow (RLIMIT_FSIZE), as it does on a full disk."""
    content = zipped({"000.dcm": np.random.default_rng(0).bytes(100_000)})
    (tmp_path / "received").write_bytes(content)
    (tmp_path / "session").mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut off as well
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"x\.zip: cannot be unpacked \(.+\). Free disk space"):
            accept(tmp_path / "received", "x.zip", tmp_path / "session", Limits())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
