"""Read NIfTI-1 and NIfTI-2 without converting to float64: inflate into one array and view it as the stored type.

nibabel parses the header and selects the affine (sform, else qform, else pixdim). Its data path is not used because
it converts everything to float64, which needs four times the memory of a scan.
"""

from __future__ import annotations

import io
import logging
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import deflate
import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from ctx_distill.data.io.hounsfield import to_hounsfield
from ctx_distill.data.io.size_limits import check_size
from ctx_distill.errors import InputError

log = logging.getLogger(__name__)

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# xyzt_units, low three bits: metre, millimetre, micrometre (nifti1.h). 0 is unknown, taken as mm by convention.
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_MAX_CODE = 5  # last coordinate system code in nifti1.h and nifti2.h
_CHUNK = 1 << 20
# Bytes allowed after the voxels: some writers pad to a block. With more, the header does not describe the file.
_MAX_PADDING = 1 << 16


def read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return voxels (k, j, i) in HU, and their affine (4, 4) to LPS mm.

    The file's last axis comes first, so that no data are moved.

    Raises:
        InputError: a damaged or truncated file, a size that the file cannot hold, colour or complex voxels.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stored = path.stat().st_size
        # The suffix is ignored: gzipped .nii files, and the reverse, are common and harmless.
        stream: BinaryIO = _Inflate(file, path) if compressed else file  # type: ignore[assignment]
        header = _header(path, stream)
        shape = tuple(int(n) for n in header.get_data_shape())
        while len(shape) > 3 and shape[-1] == 1:  # a time axis of one
            shape = shape[:-1]
        dtype = header.get_data_dtype()
        if dtype.names is not None or dtype.kind not in "iuf":
            raise InputError(
                f"{path}: voxels of type {dtype} (colour or complex); expected one number per voxel, in HU"
            )
        check_size(path, shape, dtype.itemsize, stored, compressed)
        slope, intercept = _scaling(path, header)
        affine = _affine(path, header)
        offset = int(header["vox_offset"])
        size = int(np.prod(shape)) * dtype.itemsize
        raw = _inflate_at_once(file, offset, size) if compressed else None
        if raw is None:
            _skip(path, stream, offset - int(header["sizeof_hdr"]))
            raw = np.empty(size, dtype=np.uint8)
            _fill(path, stream, raw, " x ".join(map(str, shape)))
            if compressed:
                _finish(path, stream)
    voxels = raw.view(dtype).reshape(shape[::-1])
    return to_hounsfield(voxels, slope, intercept), affine


def _inflate_at_once(file: BinaryIO, offset: int, size: int) -> NDArray[np.uint8] | None:
    """Return `size` bytes from `offset` of a gzip file after checking its checksum; None if it must be streamed.

    libdeflate is 2.5 times as fast as zlib, but needs a single member of known length. That covers nearly every file.
    Files with several members, padding, surplus data or damage are streamed, which also identifies the error. The
    buffer has the size that the header declares, which protects against decompression bombs.
    """
    position = file.tell()
    file.seek(0)
    packed = file.read()
    file.seek(position)
    declared = offset + size
    surplus = (int.from_bytes(packed[-4:], "little") - declared) % (1 << 32)
    if surplus > _MAX_PADDING:
        return None
    try:
        inflated = deflate.gzip_decompress(packed, declared + surplus)
    except deflate.DeflateError:
        return None
    if len(inflated) != declared + surplus:
        return None
    return np.frombuffer(inflated, dtype=np.uint8, count=size, offset=offset)


def _header(path: Path, stream: BinaryIO) -> Any:
    start = stream.read(4)
    size = int.from_bytes(start, "little") if len(start) == 4 else 0
    swapped = int.from_bytes(start, "big") if len(start) == 4 else 0
    header_types = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    header_type = header_types.get(size) or header_types.get(swapped)
    if header_type is None:
        raise InputError(
            f"{path}: starts with {start!r}; expected a NIfTI header, the file is damaged or of another format"
        )
    rest = stream.read((size if size in header_types else swapped) - 4)
    try:
        header = header_type.from_fileobj(io.BytesIO(start + rest), check=False)
        magic = bytes(header["magic"])[:3]
        header.get_data_dtype(), header.get_data_shape()
    except (ValueError, KeyError, TypeError, OverflowError, HeaderDataError) as error:
        raise InputError(f"{path}: cannot read the NIfTI header ({error}); write the file again") from error
    if magic not in (b"n+1", b"n+2"):
        raise InputError(
            f"{path}: the header's magic is {bytes(header['magic'])!r}; expected a single-file NIfTI (n+1 or n+2), "
            "convert Analyze or .hdr/.img pairs"
        )
    return header


def _scaling(path: Path, header: Any) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise InputError(f"{path}: invalid slope or intercept ({error}); repair scl_slope and scl_inter") from error
    # nibabel returns (None, None) for slope 0, which the standard defines as "do not scale".
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def _affine(path: Path, header: Any) -> NDArray[np.float64]:
    """Return the affine (4, 4) from array index (k, j, i) to LPS mm."""
    for name in ("sform_code", "qform_code"):
        if not 0 <= int(header[name]) <= _MAX_CODE:
            raise InputError(f"{path}: {name} is {int(header[name])}; expected 0 to {_MAX_CODE}, repair the header")
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        log.warning(
            "%s: no sform and no qform; assuming that the index increases towards Left, Anterior, Superior", path
        )
    try:
        ras = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (ValueError, HeaderDataError) as error:
        raise InputError(f"{path}: invalid qform ({error}); repair the header") from error
    unit = int(header["xyzt_units"]) & 7
    if unit not in _MM_PER_UNIT:
        raise InputError(f"{path}: unit code {unit} in xyzt_units; expected metre, mm or micrometre. Repair the header")
    scale = np.diag([_MM_PER_UNIT[unit]] * 3 + [1.0])
    affine: NDArray[np.float64] = (_RAS_TO_LPS @ scale @ ras)[:, [2, 1, 0, 3]]
    return affine


def _skip(path: Path, stream: BinaryIO, count: int) -> None:
    """Skip the extensions between header and voxels."""
    if not 0 <= count <= 1 << 28:
        raise InputError(f"{path}: voxels start {count} bytes after the header; repair vox_offset")
    while count > 0:
        piece = stream.read(min(count, _CHUNK))
        if not piece:
            raise InputError(f"{path}: ends before the voxels start; the file is truncated, copy it again")
        count -= len(piece)


def _fill(path: Path, stream: BinaryIO, raw: NDArray[np.uint8], shape_text: str) -> None:
    view, done = memoryview(raw.data), 0
    while done < len(view):
        if isinstance(stream, _Inflate):
            piece = stream.read(min(len(view) - done, _CHUNK))
            got = len(piece)
            view[done : done + got] = piece
        else:
            got = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise InputError(
                f"{path}: ends after {done} of {len(view)} bytes of voxels ({shape_text}); the file is truncated, copy it again"
            )
        done += got


def _finish(path: Path, stream: Any) -> None:
    """Read to the end of the gzip stream, where its checksum is verified."""
    surplus = 0
    while piece := stream.read(_CHUNK):
        surplus += len(piece)
        if surplus > _MAX_PADDING:
            raise InputError(
                f"{path}: continues after the voxels that the header declares; the header is wrong or damaged"
            )


class _Inflate:
    """Forward-only gzip reader with bounded memory and support for several members (bgzip).

    Checksum and length are verified at the end. `gzip.GzipFile` is not used because it copies every byte twice more.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._inflater = zlib.decompressobj(wbits=31)
        self._pending = b""

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes, fewer only at the end of the stream."""
        pieces: list[bytes] = []
        while count > 0:
            if self._inflater.eof and not self._next_member():
                break
            if not self._pending:
                self._pending = self._file.read(_CHUNK)
            try:
                piece = self._inflater.decompress(self._pending, count)
            except zlib.error as error:
                raise InputError(f"{self._path}: damaged gzip data ({error}); copy the file again") from error
            if not piece and not self._pending and not self._inflater.eof:
                raise InputError(f"{self._path}: the gzip stream ends early; the file is truncated, copy it again")
            self._pending = self._inflater.unconsumed_tail
            pieces.append(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _next_member(self) -> bool:
        rest = self._inflater.unused_data
        # Zeros after the last member are padding written by gzip and tar tools; anything else is an error.
        while len(rest) < 2 or not rest.strip(b"\0"):
            more = self._file.read(_CHUNK)
            if not more:
                break
            rest = rest.lstrip(b"\0") + more
        if not rest.strip(b"\0"):
            return False
        if not rest.startswith(b"\x1f\x8b"):
            raise InputError(f"{self._path}: unexpected data after the end of the gzip stream; copy the file again")
        self._inflater, self._pending = zlib.decompressobj(wbits=31), rest
        return True
