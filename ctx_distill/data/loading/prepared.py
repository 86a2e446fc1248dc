"""Prepared volumes on disk: what a model takes, made once and mapped into memory.

    OUT/prepared.json            volume spec, projection version
    OUT/items/3f/3f9a...json     an item: its source, geometry, checksums; written last, so that it marks a whole item
    OUT/items/3f/3f9a...npy      (1, D, H, W) int16 steps (`data.rounding`)
    OUT/items/3f/3f9a...projection.npy   (H, W) float32, where the preset asks for the frontal projection

An item belongs to a source of one size and modification time under one spec; anything else is refused, never used.
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
        folder: where it lies.
        spec: of every item; `stored` is `int16`.
        projection: whether items hold the scan's frontal projection.
        preset: the name under which items written now are asked for; the spec decides what they are.
    """

    folder: Path
    spec: VolumeSpec
    projection: bool
    preset: str | None = None
    _verified: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def create(cls, folder: Path, spec: VolumeSpec, projection: bool, preset: str | None = None) -> PreparedFolder:
        """A new folder, or the one that stands there under the same spec.

        Raises:
            InputError: the folder holds volumes of another spec, or a projection of another kind.
        """
        made = cls(folder, spec, projection, preset)
        if (folder / META).is_file():
            made._compare()
        else:
            write_json(folder / META, made._meta())
        return made

    @classmethod
    def open(cls, folder: Path, spec: VolumeSpec, projection: bool) -> PreparedFolder:
        """A folder to read from.

        Raises:
            InputError: nothing is prepared there, or for another spec.
        """
        if not (folder / META).is_file():
            raise InputError(f"{folder}: holds no {META}; prepare it first: ctx-distill prepare MANIFEST {folder}")
        opened = cls(folder, spec, projection)
        opened._compare()
        return opened

    @classmethod
    def standing(cls, folder: Path) -> PreparedFolder:
        """A folder as it stands, under its own spec, to check it.

        Raises:
            InputError: nothing is prepared there.
        """
        found = _read_json(folder / META) if (folder / META).is_file() else {}
        if "volume_spec" not in found:
            raise InputError(f"{folder}: holds no {META}; prepare it first: ctx-distill prepare MANIFEST {folder}")
        spec = VolumeSpec.from_config(found["volume_spec"])
        return cls.open(folder, spec, found.get("projection_version") is not None)

    def _meta(self) -> dict[str, Any]:
        version = PROJECTION_VERSION if self.projection else None
        return {"format": 1, "volume_spec": self.spec.to_config(), "fingerprint": self.spec.fingerprint(),
                "projection_version": version}  # fmt: skip

    def _compare(self) -> None:
        found = _read_json(self.folder / META)
        wanted = self._meta()
        if found.get("fingerprint") != wanted["fingerprint"]:
            raise InputError(
                f"{self.folder / META}: prepared under the volume spec {found.get('volume_spec')}, asked for"
                f" {wanted['volume_spec']}; prepare into another folder, or set data.init_args.volume to the first."
            )
        if self.projection and found.get("projection_version") != wanted["projection_version"]:
            raise InputError(
                f"{self.folder / META}: projections of version {found.get('projection_version')}, asked for version"
                f" {wanted['projection_version']}; prepare into another folder with a preset that asks for them."
            )

    def _stem(self, image_id: str) -> Path:
        name = hashlib.sha256(image_id.encode()).hexdigest()[:32]
        return self.folder / "items" / name[:2] / name

    def is_complete(self, image_id: str, source: ScanFile) -> bool:
        """Whether the item stands whole, for this source; its checksums are compared."""
        try:
            self._verified.discard(image_id)
            self.read(image_id, source)
        except InputError:
            return False
        return True

    def write(self, image_id: str, source: ScanFile) -> None:
        """Prepare one scan; `InputError` as `read_volume`, `OSError` where the disk is full."""
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
        """The item's int16 steps (1, D, H, W), mapped, and its projection (H, W) where this folder has them.

        Checksums are compared at an item's first read in a process.

        Raises:
            InputError: not prepared, prepared of another source or spec, or damaged.
        """
        stem = self._stem(image_id)
        names = ("volume", "projection") if self.projection else ("volume",)
        if image_id in self._verified:
            return tuple(_tensor(_part(stem, name)) for name in names)
        if not stem.with_suffix(".json").is_file():
            raise InputError(f"{self.folder}: image {image_id!r} is not prepared; run ctx-distill prepare again.")
        item = _read_json(stem.with_suffix(".json"))
        stamp, version = source.stamp(), PROJECTION_VERSION if self.projection else None
        for what, found, wanted in (
            ("image", item.get("image_id"), image_id),
            ("source (bytes, time)", item.get("source"), stamp),
            ("volume spec", item.get("fingerprint"), self.spec.fingerprint()),
            ("projection version", item.get("projection_version"), version or item.get("projection_version")),
        ):
            if found != wanted:
                raise InputError(
                    f"{stem.with_suffix('.json')}: {what} {found}, but {source.path} has {wanted}; run ctx-distill prepare again."
                )
        tensors = tuple(_tensor(_part(stem, name)) for name in names)
        for name, tensor in zip(names, tensors, strict=True):
            if _checksum(tensor.numpy()) != item.get("sha256", {}).get(name):
                raise InputError(
                    f"{_part(stem, name)}: damaged, its checksum is not the item's; run ctx-distill prepare again."
                )
        self._verified.add(image_id)
        return tensors

    def read_ahead(self, image_id: str) -> None:
        """Ask the kernel to bring the item's volume into the page cache, which all processes share."""
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
        # copy-on-write: torch wants writable memory, and the file stays as it is
        array: NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run ctx-distill prepare again.") from error
    return torch.from_numpy(array)


def _checksum(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run ctx-distill prepare again.") from error
    return value if isinstance(value, dict) else {}
