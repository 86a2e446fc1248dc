"""Small scans as bytes, as a browser would send them."""

from __future__ import annotations

import gzip
import io
import zipfile
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def nifti_bytes(voxels: NDArray[Any], spacing: tuple[float, float, float] = (2.0, 1.0, 1.0)) -> bytes:
    """A .nii.gz of (z, y, x) voxels whose index grows to Superior, Posterior, Left; spacing (z, y, x) in mm."""
    dz, dy, dx = spacing
    image = nib.Nifti1Image(np.ascontiguousarray(voxels.T), np.diag([-dx, -dy, dz, 1.0]))
    return gzip.compress(image.to_bytes(), mtime=0)


def dicom_zip(
    voxels: NDArray[np.int16],
    spacing: tuple[float, float, float] = (2.0, 1.0, 1.0),
    rows: int | None = None,
    columns: int | None = None,
    without: int | None = None,
) -> bytes:
    """A zip of a CT series of (z, y, x) voxels in HU, in a folder; rows and columns as the headers shall claim, without one slice."""
    series = generate_uid()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, plane in enumerate(voxels):
            if number == without:
                continue
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            item = pydicom.Dataset()
            item.file_meta = meta
            item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
            item.Modality, item.SeriesInstanceUID = "CT", series
            item.ImagePositionPatient = [0.0, 0.0, number * spacing[0]]
            item.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            item.PixelSpacing = [spacing[1], spacing[2]]
            item.Rows, item.Columns = rows or plane.shape[0], columns or plane.shape[1]
            item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
            item.BitsAllocated = item.BitsStored = 16
            item.HighBit, item.PixelRepresentation = 15, 1
            item.RescaleSlope, item.RescaleIntercept = 1, 0
            item.PixelData = np.ascontiguousarray(plane).tobytes()
            file = io.BytesIO()
            pydicom.dcmwrite(file, item, enforce_file_format=True)
            archive.writestr(f"study/IM{number:04d}.dcm", file.getvalue())
    return out.getvalue()
