"""LightningDataModules over the two manifests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from ctx_distill.data.loading.cache import shared_cache
from ctx_distill.data.loading.datasets import (
    Collate,
    Item,
    ManifestDataset,
    PreparedDataset,
    PreparedLoader,
    ct_dataset,
    xray_dataset,
)
from ctx_distill.data.loading.order import EpochBatches, EpochPart, EpochShuffle, InOrder, Mixing
from ctx_distill.data.loading.prepared import PreparedFolder
from ctx_distill.data.loading.unreadable import SetAside
from ctx_distill.data.manifests.index_rows import (
    RowFilter,
    leave_out_for_index,
    leave_out_for_validation,
    patients_of,
    training_language,
)
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.data.transforms.projection import PROJECTION_VERSION
from ctx_distill.distributed import world_size
from ctx_distill.errors import InputError
from ctx_distill.seeds import run_seed
from ctx_distill.types import CTBatch, XrayBatch


class ManifestDataModule(L.LightningDataModule):
    """What both data modules share: loaders over parts of a manifest.

    Args:
        batch_size: items of a training batch, a rank.
        eval_batch_size: items of a validation or prediction batch, a rank.
        num_workers: reading processes; 0 reads in the training process and lets stages share the cache.
        cache_gb: gigabytes of prepared tensors to keep in memory, a process.
        seed: of the shuffle; None: the run's seed (`seed_everything`).
    """

    collate: Collate
    manifest: Manifest
    text: Literal["required", "optional"] = "optional"
    unreadable_share = 0.01
    set_aside: SetAside | None = None

    def __init__(
        self, batch_size: int, eval_batch_size: int, num_workers: int, cache_gb: float, seed: int | None
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.cache = shared_cache(cache_gb)
        self.batches: EpochBatches | None = None
        self.reopen = False
        self._left: dict[str, int] = {}
        self._training: dict[str, Manifest] = {}

    def describe(self) -> dict[str, Any]:
        """Facts of the data for `run.json`."""
        return {}

    def with_text(self, manifest: Manifest) -> Manifest:
        """The rows that have findings or an impression, where the stage needs text; else all."""
        return manifest if self.text == "optional" else self.report_rows(manifest)

    @staticmethod
    def report_rows(manifest: Manifest) -> Manifest:
        """The rows that have findings or an impression."""
        return manifest.where(manifest.has_report())

    def training_rows(self) -> Manifest:
        """The rows that this stage trains on; chosen once for each value of `text`."""
        if self.text not in self._training:
            self._training[self.text] = self._choose_training_rows()
        return self._training[self.text]

    def _choose_training_rows(self) -> Manifest:
        return self.with_text(self.manifest.split("train"))

    def validation_rows(self) -> Manifest:
        """The rows of split `val` that this stage's validation loss is taken over; may be empty."""
        return self.with_text(self.manifest.split("val"))

    def dataset(self, manifest: Manifest) -> ManifestDataset:
        """A dataset over (part of) the manifest."""
        raise InputError(f"{type(self).__name__}: has no dataset; use CTDataModule or XrayDataModule.")

    def loader(self, manifest: Manifest, *, train: bool = False) -> DataLoader[Item]:
        """A loader over (part of) a manifest; training shuffles and drops a last batch that is not full."""
        dataset = self.dataset(manifest)
        dataset.replace_unreadable = train
        kind = PreparedLoader if isinstance(dataset, PreparedDataset) else DataLoader
        batches: dict[str, Any] = {"sampler": InOrder(len(manifest)), "batch_size": self.eval_batch_size}
        if train:
            batches = {"sampler": EpochBatches(self.order(manifest), self.batch_size), "batch_size": None}
        return kind(
            dataset,
            **batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=self._feeds_a_gpu(),
            # of its own, so that opening a loader does not move the random state that training draws from
            generator=torch.Generator().manual_seed(self.shuffle_seed()),
        )

    def shuffle_seed(self) -> int:
        """Return the seed of the order of an epoch."""
        return run_seed() if self.seed is None else self.seed

    def _feeds_a_gpu(self) -> bool:
        """Whether batches go to a GPU; Lightning copies pinned ones without waiting."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def order(self, manifest: Manifest) -> EpochShuffle:
        """The order of a training epoch over these rows."""
        return EpochShuffle(len(manifest), self.shuffle_seed())

    def train_dataloader(self) -> DataLoader[Item]:
        """Shuffled `train` rows.

        Raises:
            InputError: a rank would get no batch; the same on every rank.
        """
        rows = self.training_rows()
        self.set_aside = SetAside(len(rows), self.unreadable_share)
        loader = self.loader(rows, train=True)
        assert isinstance(loader.sampler, EpochBatches)
        self.batches = loader.sampler
        self._refuse_no_batch(rows, len(loader))
        self._resume()
        return loader

    def _refuse_no_batch(self, rows: Manifest, batches: int) -> None:
        """Refuse a training without a batch per rank; `batches` is the same on every rank."""
        limit = self.trainer.limit_train_batches if self.trainer is not None else None
        taken = int(batches * limit) if isinstance(limit, float) else batches
        if taken:
            return
        found = f"{len(rows)} training rows on {world_size()} ranks"
        if batches:
            found += f" make {batches} batches each, of which trainer.limit_train_batches={limit} takes none"
            remedy = "Raise the limit, or set it to 1.0."
        else:
            found += " leave no row for each rank"
            remedy = "Train on fewer ranks, or give more rows with split `train`."
        raise InputError(f"{rows.path}: {found}, so nothing would be trained. {remedy}")

    def state_dict(self) -> dict[str, Any]:
        """What is left of the epoch, for a checkpoint; nothing where a subclass opens a training loader of another kind."""
        trainer = self.trainer
        assert trainer is not None
        if self.batches is None:
            return {}
        loop = trainer.fit_loop
        # Past the last batch Lightning counts the epoch as done already, and its batches still.
        within = loop.epoch_progress.current.ready > trainer.current_epoch
        part, most = self.batches.part(trainer.current_epoch), int(trainer.num_training_batches)
        if part.batches > most:  # limit_train_batches
            part = replace(part, end=part.after(most).start, batches=most)
        done = loop.epoch_loop.batch_progress.current.completed - (most - part.batches) if within else 0
        return dict(vars(part.after(done)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the epoch where the checkpoint stopped."""
        self._left = state_dict
        # FSDP2 restores once the loader is open, and its workers have read ahead
        self.reopen = self.batches is not None
        self._resume()

    def _resume(self) -> None:
        if not self._left or self.batches is None:
            return
        left = self._left
        if "items" in left:  # a checkpoint of before the number of ranks could change
            whole = self.batches.part(left["epoch"])
            done = left["items"] * whole.batches // whole.end if whole.end else 0
            self.batches.resume(replace(whole.after(done), epoch=left["epoch"]))
            return
        self.batches.resume(EpochPart(**left))

    def batches_left(self, most: int) -> int:
        """Global batches that are left of the epoch at which the run is resumed, with the ranks that there are now.

        Args:
            most: batches of a whole epoch.
        """
        assert self.batches is not None
        part = self.batches.part(self._left["epoch"])
        if part.start > 0 and part.batches > most:
            part = replace(part, batches=most)
            self.batches.resume(part)
        return min(part.batches, most)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count what could not be read; too much of it ends the run."""
        found = getattr(batch, "unreadable", None)
        if found and self.set_aside is not None:
            self.set_aside.add(found, self._log_folder())
        return batch

    def _log_folder(self) -> Path | None:
        folder = self.trainer.log_dir if self.trainer is not None and self.trainer.is_global_zero else None
        return Path(folder) if folder else None

    def val_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        """`val` rows in order; none where the manifest has none."""
        val = self.validation_rows()
        return self.loader(val) if len(val) else []


class CTDataModule(ManifestDataModule):
    """CT volumes streamed from the files of a manifest, with their reports.

    Args:
        ct_manifest: CSV or Parquet manifest.
        volume: spacing, shape and window that every volume is brought to.
        batch_size: see `ManifestDataModule`.
        eval_batch_size: see `ManifestDataModule`.
        num_workers: see `ManifestDataModule`.
        cache_gb: see `ManifestDataModule`.
        seed: see `ManifestDataModule`.
        with_labels: whether batches carry labels: for the supervised heads, and for logs.
        text: `required` leaves studies without any report text out of training and validation, and says how many.
        projection: whether batches carry each scan's own frontal radiograph, computed from the file as it is read.
        prepared: a folder that `ctx-distill prepare` wrote of this manifest and volume spec; volumes are read from there,
            and the spec's `stored` becomes `int16`. A run on the scans themselves with `volume.stored: int16` gets
            the same tensors bit for bit.
        mixing: shares of data sets or classes in a training epoch; None takes every row once.
        unreadable_share: of the training rows that may be unreadable; each is replaced by another and logged.
        needs_training: refuse a manifest without `train` rows with text; a finished model can be asked about any.
    """

    collate = Collate(CTBatch)

    def __init__(
        self,
        ct_manifest: str,
        volume: VolumeSpec,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        cache_gb: float = 1.0,
        seed: int | None = None,
        with_labels: bool = False,
        text: Literal["required", "optional"] = "optional",
        projection: bool = False,
        prepared: str | None = None,
        mixing: Mixing | None = None,
        unreadable_share: float = 0.01,
        needs_training: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, cache_gb, seed)
        self.mixing, self.unreadable_share = mixing, unreadable_share
        self.volume, self.with_labels, self.text, self.projection = volume, with_labels, text, projection
        self.prepared: PreparedFolder | None = None
        if prepared is not None:
            self.volume = replace(volume, stored="int16")
            self.prepared = PreparedFolder.open(Path(prepared), self.volume, projection)
        self.manifest = read_manifest(Path(ct_manifest))
        if not needs_training:
            return
        if not len(self.manifest.split("train")):
            raise InputError(f"{ct_manifest}: no row has split `train`; every stage trains on some. Set column split.")
        silent = len(self.manifest) - len(self.with_text(self.manifest))
        if text == "required" and silent:
            print(f"{ct_manifest}: {silent} of {len(self.manifest)} CTs have no report text and are left out here")
        if not len(self.training_rows()):
            raise InputError(
                f"{ct_manifest}: no `train` row has findings or an impression; this stage learns from them."
            )

    def describe(self) -> dict[str, Any]:
        """The CT manifest and the volume spec."""
        projection = {"projection_version": PROJECTION_VERSION} if self.projection else {}
        return {"ct": describe_manifest(self.manifest), "volume_spec": self.volume.to_config(), **projection}

    def order(self, manifest: Manifest) -> EpochShuffle:
        """As the base class, under the shares of `mixing` where it is given."""
        if self.mixing is None:
            return super().order(manifest)
        groups, shares = self.mixing.groups(manifest, self.with_labels)
        return EpochShuffle(len(manifest), self.shuffle_seed(), groups, shares)

    def dataset(self, manifest: Manifest) -> ManifestDataset:
        """CT volumes of (part of) the manifest."""
        if self.prepared is not None:
            return PreparedDataset(manifest, self.prepared, self.with_labels)
        return ct_dataset(manifest, self.volume, self.cache, self.with_labels, self.projection)


class XrayDataModule(ManifestDataModule):
    """Radiographs of a manifest, preprocessed by the task's expert.

    The task sets `preprocess` ((H, W) in [0, 1] to (C, h, w)) and `preprocess_key` (which names it to the cache)
    before the first loader is asked for.

    Args:
        xray_manifest: CSV or Parquet manifest of the X-rays.
        ct_manifest: manifest of the CTs, so that X-rays of held-out CT patients are excluded from index, training and
            validation; None excludes no patient.
        batch_size: see `ManifestDataModule`.
        eval_batch_size: see `ManifestDataModule`.
        num_workers: see `ManifestDataModule`.
        cache_gb: see `ManifestDataModule`.
        seed: see `ManifestDataModule`.
        frontal_only: leave out views that are not frontal.
        language: language of the reports to take; None takes the most common one.
    """

    collate = Collate(XrayBatch)

    def __init__(
        self,
        xray_manifest: str,
        ct_manifest: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        cache_gb: float = 1.0,
        seed: int | None = None,
        frontal_only: bool = True,
        language: str | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, cache_gb, seed)
        self.frontal_only, self.language = frontal_only, language
        self.preprocess: Callable[[NDArray[np.float32]], Tensor] | None = None
        self.preprocess_key = ""
        self.manifest = read_manifest(Path(xray_manifest))
        self.ct = read_manifest(Path(ct_manifest)) if ct_manifest else None

    def describe(self) -> dict[str, Any]:
        """The X-ray manifest."""
        return {"xray": describe_manifest(self.manifest)}

    def pool(self) -> tuple[Manifest, dict[str, int]]:
        """The rows that index and expert may take, and how many were excluded, by reason."""
        return leave_out_for_index(self.manifest, self.ct, frontal_only=self.frontal_only, language=self.language)

    def _choose_training_rows(self) -> Manifest:
        """The rows that the expert trains on: those of `pool`, with text where the stage needs it."""
        return self.with_text(self.pool()[0])

    def validation_rows(self) -> Manifest:
        """The rows of split `val` under the exclusions of `leave_out_for_validation`; may be empty."""
        return self.with_text(self._validation_pool()[0])

    def _validation_pool(self) -> tuple[Manifest, dict[str, int]]:
        language = self.training_language()
        return leave_out_for_validation(self.manifest, self.ct, frontal_only=self.frontal_only, language=language)

    def training_language(self) -> str | None:
        """The language of the training rows, in lower case; None where they name none."""
        return training_language(self.manifest, self.ct, frontal_only=self.frontal_only, language=self.language)

    def ct_reports(self) -> tuple[Manifest | None, dict[str, int]]:
        """CT `train` rows whose reports the expert may read, and how many were excluded, by reason.

        Those of patients of the X-rays' `val` and `test`, which score the expert, and of another language than the
        training rows' are excluded.

        Returns:
            The rows (None without a CT manifest), and the number of excluded `train` rows by reason.
        """
        if self.ct is None:
            return None, {}
        chosen = RowFilter(self.ct.split("train"))
        chosen.exclude_patients("patient is in X-ray val or test", patients_of(self.manifest, "val", "test"))
        chosen.exclude_other_languages(self.training_language())
        return self.report_rows(chosen.rows()), chosen.counts

    def excluded(self) -> dict[str, int]:
        """Rows that were excluded from training, validation and the CT reports, by reason (in words to print)."""
        pool, counts = self.pool()
        silent = len(pool) - len(self.with_text(pool))
        if self.text == "required":
            counts["no report text"] = silent
        validation = {f"validation: {reason}": count for reason, count in self._validation_pool()[1].items()}
        reports = {f"CT train reports: {reason}": count for reason, count in self.ct_reports()[1].items()}
        return {**counts, **validation, **reports}

    def dataset(self, manifest: Manifest) -> ManifestDataset:
        """Radiographs of (part of) the manifest, as the task's expert wants them."""
        if self.preprocess is None:
            raise InputError("XrayDataModule: no task has set `preprocess`; use it with the expert or the index task.")
        return xray_dataset(manifest, self.preprocess, self.cache, self.preprocess_key)


def describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """Path, fingerprint and counts of a manifest, as JSON values."""
    splits: Sequence[str] = ("train", "val", "test")
    split = manifest.column("split")
    return {
        "path": str(manifest.path.resolve()),
        "fingerprint": manifest.fingerprint,
        "images": len(manifest),
        "studies": len(np.unique(manifest.study_codes())),
        "patients": int(manifest.column("patient_id").nunique()),
        "splits": {name: int((split == name).sum()) for name in splits},
        "labels": list(manifest.finding_names),
        "sources": sorted(set(manifest.column("source").unique()) - {""}) if manifest.has_column("source") else [],
        "synthetic": manifest.synthetic,
    }
