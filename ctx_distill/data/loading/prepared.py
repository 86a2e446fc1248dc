"""Prepared volumes on disk: model inputs, computed once and memory-mapped.

    OUT/prepared.json            volume spec, projection version
    OUT/items/3f/3f9a...json     source, geometry and checksums of an item; written last, so it marks a complete item
    OUT/items/3f/3f9a...npy      (1, D, H, W) int16 steps (`data.rounding`)
    OUT/items/3f/3f9a...projection.npy   (H, W) float32, if the preset includes the frontal projection

An item is valid for one size and modification time of its source and one spec; otherwise it is rejected.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.transforms.model_volume import VolumeSpec, prepare_steps
from ctx_distill.data.transforms.projection import PROJECTION_VERSION, square_projection
from ctx_distill.errors import InputError
from ctx_distill.files import write_bytes, write_json

META = "prepared.json"


@dataclass
class PreparedFolder:
    """A folder of prepared volumes under one spec.

    Attributes:
        folder: path.
        spec: spec of every item; `stored` is `int16`.
        projection: whether items include the scan's frontal projection.
        preset: name of the preset, recorded with new items; the spec determines their content.
    """

    folder: Path
    spec: VolumeSpec
    projection: bool
    preset: str | None = None
    _verified: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def create(cls, folder: Path, spec: VolumeSpec, projection: bool, preset: str | None = None) -> PreparedFolder:
        """Create a folder, or open an existing one with the same spec.

        Raises:
            InputError: the folder contains volumes of another spec or projections of another version.
        """
        prepared = cls(folder, spec, projection, preset)
        if (folder / META).is_file():
            prepared._compare()
        else:
            write_json(folder / META, prepared._meta())
        return prepared

    @classmethod
    def open(cls, folder: Path, spec: VolumeSpec, projection: bool) -> PreparedFolder:
        """Open a folder for reading.

        Raises:
            InputError: the folder is not prepared, or is prepared for another spec.
        """
        if not (folder / META).is_file():
            raise InputError(f"{folder}: no {META}; prepare the folder first: ctx-distill prepare MANIFEST {folder}")
        opened = cls(folder, spec, projection)
        opened._compare()
        return opened

    @classmethod
    def standing(cls, folder: Path) -> PreparedFolder:
        """Open an existing folder with the spec stored in it, to check it.

        Raises:
            InputError: the folder is not prepared.
        """
        meta = _read_json(folder / META) if (folder / META).is_file() else {}
        if "volume_spec" not in meta:
            raise InputError(f"{folder}: no {META}; prepare the folder first: ctx-distill prepare MANIFEST {folder}")
        spec = VolumeSpec.from_config(meta["volume_spec"])
        return cls.open(folder, spec, meta.get("projection_version") is not None)

    def _meta(self) -> dict[str, Any]:
        version = PROJECTION_VERSION if self.projection else None
        return {"format": 1, "volume_spec": self.spec.to_config(), "fingerprint": self.spec.fingerprint(),
                "projection_version": version}  # fmt: skip

    def _compare(self) -> None:
        stored = _read_json(self.folder / META)
        expected = self._meta()
        if stored.get("fingerprint") != expected["fingerprint"]:
            raise InputError(
                f"{self.folder / META}: prepared with volume spec {stored.get('volume_spec')}, but the run uses"
                f" {expected['volume_spec']}; prepare another folder, or set data.init_args.volume to the prepared spec"
            )
        if self.projection and stored.get("projection_version") != expected["projection_version"]:
            raise InputError(
                f"{self.folder / META}: contains projections of version {stored.get('projection_version')}, but version"
                f" {expected['projection_version']} is needed; prepare another folder with a preset that includes them"
            )

    def _stem(self, image_id: str) -> Path:
        name = hashlib.sha256(image_id.encode()).hexdigest()[:32]
        return self.folder / "items" / name[:2] / name

    def is_complete(self, image_id: str, source: ScanFile) -> bool:
        """Return whether the item is complete and valid for this source; verifies its checksums."""
        try:
            self._verified.discard(image_id)
            self.read(image_id, source)
        except InputError:
            return False
        return True

    def write(self, image_id: str, source: ScanFile) -> None:
        """Prepare and write one scan.

        Raises:
            InputError: as `read_volume`.
            OSError: the disk is full.
        """
        stamp = source.stamp()
        scan = source.read()
        stem = self._stem(image_id)
        arrays = {"volume": prepare_steps(scan, self.spec).numpy()}
        if self.projection:
            arrays["projection"] = square_projection(scan).numpy()
        sums = {}
        for part, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            write_bytes(_part(stem, part), content.getbuffer())
            sums[part] = _checksum(array)
        item = {
            "image_id": image_id, "source": stamp, "fingerprint": self.spec.fingerprint(),
            "volume_spec": self.spec.to_config(), "shape": list(scan.voxels.shape), "spacing_mm": list(scan.spacing), "affine_lps": scan.affine_lps.tolist(),
            "preset": self.preset, "projection_version": PROJECTION_VERSION if self.projection else None, "sha256": sums,
        }  # fmt: skip
        write_json(stem.with_suffix(".json"), item)

    def read(self, image_id: str, source: ScanFile) -> tuple[Tensor, ...]:
        """Return the item's memory-mapped int16 steps (1, D, H, W), and its projection (H, W) if included.

        Checksums are verified when a process first reads an item.

        Raises:
            InputError: the item is not prepared, belongs to another source or spec, or is damaged.
        """
        stem = self._stem(image_id)
        names = ("volume", "projection") if self.projection else ("volume",)
        if image_id in self._verified:
            return tuple(_tensor(_part(stem, name)) for name in names)
        if not stem.with_suffix(".json").is_file():
            raise InputError(f"{self.folder}: image {image_id!r} is not prepared; run ctx-distill prepare again")
        item = _read_json(stem.with_suffix(".json"))
        stamp, version = source.stamp(), PROJECTION_VERSION if self.projection else None
        for field_name, stored, expected in (
            ("image", item.get("image_id"), image_id),
            ("source (bytes, time)", item.get("source"), stamp),
            ("volume spec", item.get("fingerprint"), self.spec.fingerprint()),
            ("projection version", item.get("projection_version"), version or item.get("projection_version")),
        ):
            if stored != expected:
                raise InputError(
                    f"{stem.with_suffix('.json')}: {field_name} {stored}, but {source.path} has {expected}; run ctx-distill prepare again"
                )
        tensors = tuple(_tensor(_part(stem, name)) for name in names)
        for name, tensor in zip(names, tensors, strict=True):
            if _checksum(tensor.numpy()) != item.get("sha256", {}).get(name):
                raise InputError(
                    f"{_part(stem, name)}: checksum mismatch, the file is damaged; run ctx-distill prepare again"
                )
        self._verified.add(image_id)
        return tensors

    def read_ahead(self, image_id: str) -> None:
        """Prefetch the item's volume into the page cache, which all processes share."""
        if hasattr(os, "posix_fadvise"):
            handle = os.open(_part(self._stem(image_id), "volume"), os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)


def _part(stem: Path, name: str) -> Path:
    return stem.with_suffix(".npy" if name == "volume" else f".{name}.npy")


def _tensor(path: Path) -> Tensor:
    try:
        # copy-on-write: torch needs writable memory, and the file must not change
        array: NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot read the file ({error}); run ctx-distill prepare again") from error
    return torch.from_numpy(array)


def _checksum(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the file ({error}); run ctx-distill prepare again") from error
    return value if isinstance(value, dict) else {}
