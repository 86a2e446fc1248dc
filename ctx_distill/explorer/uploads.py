"""Validate uploads and convert them to the input of `read_volume`. Names and declared sizes are not trusted.

Names inside a zip are never used as paths: entries are written as 000000, 000001, ... into one folder. Paths that leave the
archive and links are rejected nevertheless, because no scanner writes them. Sizes are checked while unpacking.
"""

from __future__ import annotations

import math
import re
import shutil
import stat
import zipfile
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath

import nibabel as nib
import pydicom
from nibabel.spatialimages import HeaderDataError

from ctx_distill.errors import InputError
from ctx_distill.explorer.limits import MB, Limits

TAKEN = "a CT as .nii.gz or .nii, or a .zip of one series of DICOM slices"
_CHUNK = 1 << 20
_HEADER = 540
# The end record of a zip with the longest comment, and zip64's before it; bytes of an entry with a long name.
_TAIL = 22 + 65535 + 76
_ENTRY = 2048
# Files that file managers add to archives.
_LITTER = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$|Thumbs\.db$|desktop\.ini$|\._)", re.IGNORECASE)


@dataclass(frozen=True)
class Upload:
    """A checked upload.

    Attributes:
        path: The file or folder of slices, for `read_volume`.
        kind: Format, in words.
        names: The user's file names by the names used here.
    """

    path: Path
    kind: str
    names: dict[str, str] = field(default_factory=dict)

    def in_users_words(self, message: str) -> str:
        """Replace file names in a message by the user's, and remove this machine's folders."""
        message = message.replace(f"{self.path.parent}/", "").replace(str(self.path), self.path.name)
        for name in sorted(self.names, key=len, reverse=True):
            message = message.replace(name, self.names[name])
        return message


def accept(received: Path, name: str, folder: Path, limits: Limits) -> Upload:
    """Check a received file, and unpack it if it is a zip.

    Args:
        received: The received file.
        name: The user's file name, which is only displayed and never used as a path.
        folder: An empty folder to unpack into.
        limits: Limits of size and number.

    Returns:
        The checked upload.

    Raises:
        InputError: The file is not a scan or is too large, or it is an archive with paths that leave it, links, other
            archives, too many or too large entries, or not exactly one scan.
    """
    shown = clean_name(name)
    start = received.open("rb").read(_HEADER)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _from_zip(received, shown, folder, limits)
    if start[128:132] == b"DICM":
        raise InputError(f"{shown}: a single DICOM file; expected {TAKEN}. Zip the folder of the series")
    packed = start[:2] == b"\x1f\x8b"
    path = folder / ("scan.nii.gz" if packed else "scan.nii")
    check_nifti(received, shown, limits)
    received.replace(path)
    return Upload(path, "NIfTI", {path.name: shown})


def clean_name(name: str) -> str:
    """Return a file name without folders and control characters, of at most 120 characters."""
    base = re.split(r"[/\\]", name)[-1]
    return "".join(c for c in base if c.isprintable())[:120] or "upload"


def check_nifti(path: Path, shown: str, limits: Limits) -> None:
    """Reject files that are not NIfTI, or whose header declares too many voxels, unpacking only the header."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if start[:2] == b"\x1f\x8b":
        try:
            start = zlib.decompressobj(wbits=31).decompress(start, _HEADER)
        except zlib.error as error:
            raise InputError(
                f"{shown}: the gzip data are corrupt ({error}); expected {TAKEN}. Copy the file again"
            ) from error
    size = int.from_bytes(start[:4], "little")
    swapped = int.from_bytes(start[:4], "big")
    kind = {348: nib.Nifti1Header, 540: nib.Nifti2Header}.get(size if size in (348, 540) else swapped)
    if kind is None or len(start) < 348:
        raise InputError(f"{shown}: not a supported scan; expected {TAKEN}")
    try:
        header = kind.from_fileobj(BytesIO(start), check=False)
        shape = [int(n) for n in header.get_data_shape()]
        item = int(header.get_data_dtype().itemsize)
    except (ValueError, KeyError, TypeError, OverflowError, HeaderDataError) as error:
        raise InputError(f"{shown}: the NIfTI header cannot be read ({error}). Export the scan again") from error
    if not shape or min(shape) < 1:
        raise InputError(f"{shown}: the header declares {' x '.join(map(str, shape))} voxels. Export the scan again")
    _check_claim(shown, math.prod(shape) * item, " x ".join(map(str, shape)), limits)


def check_dicom(folder: Path, upload: Upload, limits: Limits) -> None:
    """Reject slices whose headers declare too many pixels in total, and a folder without slices."""
    claimed, slices = 0, 0
    for path in sorted(folder.iterdir()):
        try:
            header = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=["Rows", "Columns", "BitsAllocated", "NumberOfFrames"]
            )
            rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
            frames = int(header.get("NumberOfFrames") or 1)
            bits = int(header.get("BitsAllocated") or 16)
        except pydicom.errors.InvalidDicomError:
            continue
        except Exception as error:  # pydicom raises many exception types for corrupt files
            raise InputError(
                f"{upload.names.get(path.name, path.name)}: the DICOM header is corrupt ({error}). Copy the file again"
            ) from error
        slices += bool(rows and columns)
        claimed += rows * columns * frames * math.ceil(bits / 8)
    if not slices:
        raise InputError(f"no DICOM slices among the {len(upload.names)} files of the zip; expected {TAKEN}")
    _check_claim("the zip", claimed, f"{slices} slices", limits)


def _check_claim(shown: str, claimed: int, size: str, limits: Limits) -> None:
    if claimed > limits.max_unpacked_mb * MB:
        raise InputError(
            f"{shown}: declares {size} = {claimed / MB:,.0f} MB of voxels; expected at most {limits.max_unpacked_mb:,.0f} MB. "
            "Send a smaller scan, or restart the explorer with a larger --max-unpacked-mb"
        )


def _from_zip(received: Path, shown: str, folder: Path, limits: Limits) -> Upload:
    try:
        _check_directory(received, shown, limits)
        with zipfile.ZipFile(received) as archive:
            entries = _checked_entries(archive, shown, limits)
            slices = folder / "slices"
            slices.mkdir()
            names = {}
            left = int(limits.max_unpacked_mb * MB)
            for number, entry in enumerate(entries):
                file_name = f"{number:06d}"
                names[file_name] = PurePosixPath(entry.filename).name
                left -= _unpack(archive, entry, slices / file_name, left, shown, limits)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{shown}: cannot be unpacked ({error.strerror or error}). Free disk space") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{shown}: the zip is corrupt or not supported ({error}). Zip the folder again") from error
    received.unlink()
    return _one_scan(slices, shown, folder, names, limits)


def _check_directory(received: Path, shown: str, limits: Limits) -> None:
    """Reject a central directory that is too large, because `zipfile` loads it completely."""
    with received.open("rb") as file:
        file.seek(max(0, received.stat().st_size - _TAIL))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise zipfile.BadZipFile("no end record")
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    if tail[max(0, end - 20) : end].startswith(b"PK\x06\x07"):  # zip64: the record precedes its locator
        record = tail[max(0, end - 76) : end - 20]
        if not record.startswith(b"PK\x06\x06"):
            raise zipfile.BadZipFile("misplaced zip64 record")
        size = max(int.from_bytes(record[40:48], "little"), size if size != 0xFFFFFFFF else 0)
    if size > limits.max_files * _ENTRY:
        raise _too_many(shown, limits, f"a directory of {size / MB:,.0f} MB")


def _too_many(shown: str, limits: Limits, problem: str) -> InputError:
    return InputError(
        f"{shown}: {problem}; expected at most {limits.max_files:,} entries. Zip a single series, or restart the explorer with "
        "a larger --max-files"
    )


def _checked_entries(archive: zipfile.ZipFile, shown: str, limits: Limits) -> list[zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > limits.max_files:
        raise _too_many(shown, limits, f"{len(infos):,} entries")
    for info in infos:
        name = info.orig_filename.replace("\\", "/")
        if name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z]:", name) or "\0" in name:
            raise InputError(f"{shown}: the path of an entry leaves the archive ({name[:80]!r}). Zip the folder again")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(
                f"{shown}: {name[:80]!r} is a link or a device; expected regular files. Zip them without links"
            )
        if info.flag_bits & 1:
            raise InputError(f"{shown}: the zip is encrypted; expected one without a password")
    declared = sum(info.file_size for info in infos)
    if declared > limits.max_unpacked_mb * MB:
        raise _too_much(shown, limits, f"declares {declared / MB:,.0f} MB unpacked")
    entries = [info for info in infos if not info.is_dir() and not _LITTER.search(info.filename)]
    if not entries:
        raise InputError(f"{shown}: an empty zip; expected {TAKEN}")
    return entries


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, left: int, shown: str, limits: Limits) -> int:
    written = 0
    with archive.open(entry) as packed, path.open("xb") as out:
        while piece := packed.read(_CHUNK):
            written += len(piece)
            if written > left:
                raise _too_much(shown, limits, f"unpacks to more than {limits.max_unpacked_mb:,.0f} MB")
            out.write(piece)
    return written


def _too_much(shown: str, limits: Limits, problem: str) -> InputError:
    return InputError(
        f"{shown}: {problem}; expected at most {limits.max_unpacked_mb:,.0f} MB. Zip a single series, or restart the explorer "
        "with a larger --max-unpacked-mb"
    )


def _one_scan(slices: Path, shown: str, folder: Path, names: dict[str, str], limits: Limits) -> Upload:
    niftis, archives = [], []
    for file_name, name in names.items():
        with (slices / file_name).open("rb") as file:
            magic = file.read(4)
        if magic in (b"PK\x03\x04", b"PK\x05\x06"):
            archives.append(name)
        elif name.lower().endswith((".nii", ".nii.gz")):
            niftis.append(file_name)
    if archives:
        raise InputError(
            f"{shown}: contains another archive ({archives[0][:80]}); expected slices. Unpack it and zip the slices"
        )
    if not niftis:
        upload = Upload(slices, "DICOM", {**names, slices.name: shown})
        check_dicom(slices, upload, limits)
        return upload
    if len(niftis) > 1 or len(names) > 1:
        raise InputError(f"{shown}: contains {len(names)} files, {len(niftis)} of them NIfTI; expected one scan")
    nifti = niftis[0]
    check_nifti(slices / nifti, names[nifti], limits)
    packed = (slices / nifti).open("rb").read(2) == b"\x1f\x8b"
    path = folder / ("scan.nii.gz" if packed else "scan.nii")
    (slices / nifti).replace(path)
    shutil.rmtree(slices)
    return Upload(path, "NIfTI", {path.name: names[nifti]})
