"""Datasets over manifests, and collation into typed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ctx_distill.data.io.radiograph import read_radiograph
from ctx_distill.data.loading.cache import TensorCache
from ctx_distill.data.loading.prepared import PreparedFolder
from ctx_distill.data.loading.unreadable import Unreadable
from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec, prepare_volume
from ctx_distill.data.transforms.projection import PROJECTION_VERSION, square_projection
from ctx_distill.data.transforms.rounding import from_steps
from ctx_distill.errors import InputError
from ctx_distill.types import CTBatch, XrayBatch


@dataclass
class Item:
    """One image of a manifest.

    Attributes:
        tensor: (1, D, H, W) or (C, H, W); int16 steps if `steps_of` is set.
        row: row number in the manifest's full frame.
        study: integer code of the study.
        report: report text.
        labels: (F,), if the task may see labels.
        projection: (H, W), the scan's frontal projection, if requested.
        steps_of: output range of a prepared volume in int16 steps; collation converts it to float.
        unreadable: requested rows that this row replaces.
    """

    tensor: Tensor
    row: int
    study: int
    report: str
    labels: Tensor | None
    projection: Tensor | None = None
    steps_of: tuple[float, float] | None = None
    unreadable: list[Unreadable] = field(default_factory=list)


class ManifestDataset(Dataset[Item]):
    """The images of a manifest, read on access.

    Args:
        manifest: rows of the dataset.
        read: function that returns the tensor of a row, followed by the scan's projection if requested.
        cache: cache for the tensors.
        cache_keys: for each tensor, what determines it besides the file (a volume spec, an expert's preprocessing).
        with_labels: whether items include labels.

    Attributes:
        replace_unreadable: whether an unreadable image is replaced by the next readable one; for training only.
    """

    replace_unreadable = False

    def __init__(
        self,
        manifest: Manifest,
        read: Callable[[int], tuple[Tensor, ...]],
        cache: TensorCache,
        cache_keys: Sequence[str],
        with_labels: bool,
    ) -> None:
        self.manifest, self.read, self.cache, self.cache_keys = manifest, read, cache, cache_keys
        self.rows = manifest.rows
        self.studies = manifest.study_codes()
        self.labels: NDArray[np.float32] | None = manifest.labels() if with_labels else None
        self._unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: list[int]) -> list[Item]: ...

    def __getitem__(self, index: int | list[int]) -> Item | list[Item]:
        """Return one image, or the images of a batch."""
        return [self._readable(one) for one in index] if isinstance(index, list) else self._readable(index)

    def _readable(self, index: int) -> Item:
        unreadable: list[Unreadable] = []
        for step in range(len(self.rows)):
            place = (index + step) % len(self.rows)
            row = int(self.rows[place])
            try:
                if row in self._unreadable:
                    raise InputError(self._unreadable[row])
                item = self.item(place)
            except InputError as error:
                if not self.replace_unreadable:
                    raise
                self._unreadable[row] = str(error)
                unreadable.append((row, str(error)))
                continue
            item.unreadable = unreadable
            return item
        raise InputError(
            f"{self.manifest.path}: none of the {len(self.rows)} images can be read; the first error is: {unreadable[0][1]}"
        )

    def item(self, index: int) -> Item:
        """Return the image at an index, read or cached; raise `InputError` if it cannot be read."""
        row = int(self.rows[index])
        file = str(self.manifest.image_file(row))
        tensor, *more = self.cache.get_all([(file, key) for key in self.cache_keys], lambda: self.read(row))
        labels = None if self.labels is None else torch.tensor(self.labels[index])
        study, report = int(self.studies[index]), self.manifest.report(row)
        return Item(tensor, row, study, report, labels, more[0] if more else None)


def ct_dataset(
    manifest: Manifest, spec: VolumeSpec, cache: TensorCache, with_labels: bool, projection: bool = False
) -> ManifestDataset:
    """Return a dataset of CT volumes (1, D, H, W), with frontal projections from the same read if requested."""

    def read(row: int) -> tuple[Tensor, ...]:
        scan = manifest.scan_file(row).read()
        volume = prepare_volume(scan, spec)
        return (volume, square_projection(scan)) if projection else (volume,)

    keys = [spec.fingerprint(), *([f"projection {PROJECTION_VERSION}"] if projection else [])]
    return ManifestDataset(manifest, read, cache, keys, with_labels)


class PreparedDataset(ManifestDataset):
    """CT volumes of a prepared folder, memory-mapped and cached by the page cache.

    Args:
        manifest: rows of the dataset.
        folder: prepared volumes.
        with_labels: whether items include labels.
    """

    def __init__(self, manifest: Manifest, folder: PreparedFolder, with_labels: bool) -> None:
        def read(row: int) -> tuple[Tensor, ...]:
            return folder.read(manifest.image_id(row), manifest.scan_file(row))

        super().__init__(manifest, read, TensorCache(0), ["prepared"] * (2 if folder.projection else 1), with_labels)
        self.folder, self.output_range = folder, folder.spec.output_range

    def item(self, index: int) -> Item:
        """Return the image at an index; a worker prefetches the file for the training process, which maps it."""
        item = super().item(index)
        item.steps_of = self.output_range
        if get_worker_info() is not None:
            self.folder.read_ahead(self.manifest.image_id(item.row))
        return item

    def filled(self, batch: CTBatch, pin: bool = False) -> CTBatch:
        """Return a worker's batch with its volumes, mapped here and copied to page-locked memory with `pin`."""
        if not batch.volume.is_meta:
            return batch
        steps = [self.read(row)[0] for row in batch.row.tolist()]
        return replace(batch, volume=_floats(steps, self.output_range, pin))


class PreparedLoader(DataLoader[Item]):
    """Loader over a `PreparedDataset` that does not send volumes between processes.

    Workers prefetch the files into the page cache and verify checksums. This process maps the same pages, so a batch is
    written only once, instead of in the worker and again in shared memory.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        dataset = cast(PreparedDataset, self.dataset)
        for batch in super().__iter__():
            yield dataset.filled(cast(CTBatch, batch), bool(self.pin_memory))


def xray_dataset(
    manifest: Manifest, preprocess: Callable[[NDArray[np.float32]], Tensor], cache: TensorCache, cache_key: str
) -> ManifestDataset:
    """Return a dataset of radiographs (C, H, W) preprocessed for an expert."""

    def read(row: int) -> tuple[Tensor, ...]:
        return (preprocess(read_radiograph(manifest.image_file(row), manifest.inverted(row))),)

    return ManifestDataset(manifest, read, cache, [cache_key], False)


class Collate:
    """Stack items into a batch of a type; a class because worker processes must unpickle it.

    Args:
        batch: batch type.
    """

    def __init__(self, batch: type[CTBatch] | type[XrayBatch]) -> None:
        self.batch = batch

    def __call__(self, items: Sequence[Item]) -> CTBatch | XrayBatch:
        tensor = _stacked(items)
        study = torch.tensor([item.study for item in items])
        row = torch.tensor([item.row for item in items])
        unreadable = [one for item in items for one in item.unreadable]
        report = [item.report for item in items]
        if self.batch is XrayBatch:
            return XrayBatch(tensor, study, row, report, unreadable)
        labels = [item.labels for item in items if item.labels is not None]
        pictures = [item.projection for item in items if item.projection is not None]
        return CTBatch(
            tensor, study, row, report,
            labels=torch.stack(labels) if labels else None,
            projection=torch.stack(pictures) if pictures else None,
            unreadable=unreadable,
        )  # fmt: skip


def _stacked(items: Sequence[Item]) -> Tensor:
    if items[0].steps_of is None:
        return torch.stack([item.tensor for item in items])
    if get_worker_info() is not None:
        return torch.empty((len(items), *items[0].tensor.shape), device="meta")
    return _floats([item.tensor for item in items], items[0].steps_of)


def _floats(steps: Sequence[Tensor], output_range: tuple[float, float], pin: bool = False) -> Tensor:
    out = torch.empty((len(steps), *steps[0].shape), dtype=torch.float32, pin_memory=pin)
    for one, place in zip(steps, out, strict=True):
        from_steps(one, output_range, place)
    return out
