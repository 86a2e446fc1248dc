"""LightningDataModules for the CT and the X-ray manifest."""

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
    """Base class of both data modules: loaders over parts of a manifest.

    Args:
        batch_size: training batch size per rank.
        eval_batch_size: validation and prediction batch size per rank.
        num_workers: number of loader processes; with 0 the training process reads, and stages share the cache.
        cache_gb: gigabytes of prepared tensors to cache in memory, per process.
        seed: seed of the shuffle; None uses the run's seed (`seed_everything`).
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
        """Return facts about the data for `run.json`."""
        return {}

    def with_text(self, manifest: Manifest) -> Manifest:
        """Return the rows with findings or an impression if the stage needs text, else all rows."""
        return manifest if self.text == "optional" else self.report_rows(manifest)

    @staticmethod
    def report_rows(manifest: Manifest) -> Manifest:
        """Return the rows with findings or an impression."""
        return manifest.where(manifest.has_report())

    def training_rows(self) -> Manifest:
        """Return the rows that this stage trains on, selected once per value of `text`."""
        if self.text not in self._training:
            self._training[self.text] = self._choose_training_rows()
        return self._training[self.text]

    def _choose_training_rows(self) -> Manifest:
        return self.with_text(self.manifest.split("train"))

    def validation_rows(self) -> Manifest:
        """Return the `val` rows for this stage's validation loss; may be empty."""
        return self.with_text(self.manifest.split("val"))

    def dataset(self, manifest: Manifest) -> ManifestDataset:
        """Return a dataset over (part of) the manifest."""
        raise InputError(f"{type(self).__name__} has no dataset; use CTDataModule or XrayDataModule")

    def loader(self, manifest: Manifest, *, train: bool = False) -> DataLoader[Item]:
        """Return a loader over (part of) a manifest; training shuffles and drops an incomplete last batch."""
        dataset = self.dataset(manifest)
        dataset.replace_unreadable = train
        loader_type = PreparedLoader if isinstance(dataset, PreparedDataset) else DataLoader
        batches: dict[str, Any] = {"sampler": InOrder(len(manifest)), "batch_size": self.eval_batch_size}
        if train:
            batches = {"sampler": EpochBatches(self.order(manifest), self.batch_size), "batch_size": None}
        return loader_type(
            dataset,
            **batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=self._feeds_a_gpu(),
            # a separate generator, so that opening a loader does not change the random state of training
            generator=torch.Generator().manual_seed(self.shuffle_seed()),
        )

    def shuffle_seed(self) -> int:
        """Return the seed of the epoch order."""
        return run_seed() if self.seed is None else self.seed

    def _feeds_a_gpu(self) -> bool:
        """Return whether batches go to a GPU; Lightning copies pinned batches asynchronously."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def order(self, manifest: Manifest) -> EpochShuffle:
        """Return the order of a training epoch over these rows."""
        return EpochShuffle(len(manifest), self.shuffle_seed())

    def train_dataloader(self) -> DataLoader[Item]:
        """Return a loader of the shuffled `train` rows.

        Raises:
            InputError: a rank would get no batch; raised on every rank alike.
        """
        rows = self.training_rows()
        self.set_aside = SetAside(len(rows), self.unreadable_share)
        loader = self.loader(rows, train=True)
        assert isinstance(loader.sampler, EpochBatches)
        self.batches = loader.sampler
        self._require_batch(rows, len(loader))
        self._resume()
        return loader

    def _require_batch(self, rows: Manifest, batches: int) -> None:
        """Raise if a rank would get no batch; `batches` is equal on every rank."""
        limit = self.trainer.limit_train_batches if self.trainer is not None else None
        used = int(batches * limit) if isinstance(limit, float) else batches
        if used:
            return
        problem = f"{len(rows)} training rows on {world_size()} ranks"
        if batches:
            problem += f" give {batches} batches per rank, of which trainer.limit_train_batches={limit} uses none"
            remedy = "Raise the limit, or set it to 1.0."
        else:
            problem += " are fewer than one row per rank"
            remedy = "Train on fewer ranks, or add rows with split `train`."
        raise InputError(f"{rows.path}: {problem}. {remedy}")

    def state_dict(self) -> dict[str, Any]:
        """Return the rest of the epoch for a checkpoint; empty if a subclass uses another training loader."""
        trainer = self.trainer
        assert trainer is not None
        if self.batches is None:
            return {}
        loop = trainer.fit_loop
        # After the last batch, Lightning has counted the epoch but not yet reset its batch counter.
        within = loop.epoch_progress.current.ready > trainer.current_epoch
        part, max_batches = self.batches.part(trainer.current_epoch), int(trainer.num_training_batches)
        if part.batches > max_batches:  # limit_train_batches
            part = replace(part, end=part.after(max_batches).start, batches=max_batches)
        done = loop.epoch_loop.batch_progress.current.completed - (max_batches - part.batches) if within else 0
        return dict(vars(part.after(done)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the epoch where the checkpoint was written."""
        self._left = state_dict
        # FSDP2 restores after the loader was opened and its workers have prefetched
        self.reopen = self.batches is not None
        self._resume()

    def _resume(self) -> None:
        if not self._left or self.batches is None:
            return
        left = self._left
        if "items" in left:  # checkpoint format from before the number of ranks could change
            full_epoch = self.batches.part(left["epoch"])
            done = left["items"] * full_epoch.batches // full_epoch.end if full_epoch.end else 0
            self.batches.resume(replace(full_epoch.after(done), epoch=left["epoch"]))
            return
        self.batches.resume(EpochPart(**left))

    def batches_left(self, max_batches: int) -> int:
        """Return the number of global batches left in the resumed epoch, for the current number of ranks.

        Args:
            max_batches: batches of a full epoch.
        """
        assert self.batches is not None
        part = self.batches.part(self._left["epoch"])
        if part.start > 0 and part.batches > max_batches:
            part = replace(part, batches=max_batches)
            self.batches.resume(part)
        return min(part.batches, max_batches)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count unreadable images and stop the run if there are too many."""
        unreadable = getattr(batch, "unreadable", None)
        if unreadable and self.set_aside is not None:
            self.set_aside.add(unreadable, self._log_folder())
        return batch

    def _log_folder(self) -> Path | None:
        folder = self.trainer.log_dir if self.trainer is not None and self.trainer.is_global_zero else None
        return Path(folder) if folder else None

    def val_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        """Return a loader of the `val` rows in order, or an empty list if there are none."""
        val = self.validation_rows()
        return self.loader(val) if len(val) else []


class CTDataModule(ManifestDataModule):
    """Load CT volumes and their reports from the files of a manifest.

    Args:
        ct_manifest: CSV or Parquet manifest.
        volume: spacing, shape and window of every prepared volume.
        batch_size: see `ManifestDataModule`.
        eval_batch_size: see `ManifestDataModule`.
        num_workers: see `ManifestDataModule`.
        cache_gb: see `ManifestDataModule`.
        seed: see `ManifestDataModule`.
        with_labels: whether batches include labels, for the supervised heads and for logs.
        text: `required` excludes studies without report text from training and validation, and prints their number.
        projection: whether batches include each scan's frontal projection, computed when the file is read.
        prepared: folder that `ctx-distill prepare` wrote for this manifest and volume spec. Volumes are read from it,
            and the spec's `stored` becomes `int16`. Reading the scans with `volume.stored: int16` gives bit-identical
            tensors.
        mixing: shares of data sets or classes in a training epoch; None uses every row once.
        unreadable_share: max share of unreadable training rows; each is replaced by another row and logged.
        needs_training: require `train` rows with text; not needed to evaluate a finished model.
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
            raise InputError(f"{ct_manifest}: no row has split `train`, which every stage needs; set column split")
        silent = len(self.manifest) - len(self.with_text(self.manifest))
        if text == "required" and silent:
            print(f"{ct_manifest}: {silent} of {len(self.manifest)} CTs have no report text and are excluded")
        if not len(self.training_rows()):
            raise InputError(
                f"{ct_manifest}: no `train` row has findings or an impression, which this stage trains on; add reports"
            )

    def describe(self) -> dict[str, Any]:
        """Return the facts of the CT manifest and the volume spec."""
        projection = {"projection_version": PROJECTION_VERSION} if self.projection else {}
        return {"ct": describe_manifest(self.manifest), "volume_spec": self.volume.to_config(), **projection}

    def order(self, manifest: Manifest) -> EpochShuffle:
        """Return the order of a training epoch, with the shares of `mixing` if set."""
        if self.mixing is None:
            return super().order(manifest)
        groups, shares = self.mixing.groups(manifest, self.with_labels)
        return EpochShuffle(len(manifest), self.shuffle_seed(), groups, shares)

    def dataset(self, manifest: Manifest) -> ManifestDataset:
        """Return a dataset of CT volumes of (part of) the manifest."""
        if self.prepared is not None:
            return PreparedDataset(manifest, self.prepared, self.with_labels)
        return ct_dataset(manifest, self.volume, self.cache, self.with_labels, self.projection)


class XrayDataModule(ManifestDataModule):
    """Load the radiographs of a manifest, preprocessed by the task's expert.

    The task sets `preprocess` ((H, W) in [0, 1] to (C, h, w)) and `preprocess_key` (its cache key) before it requests
    the first loader.

    Args:
        xray_manifest: CSV or Parquet manifest of the X-rays.
        ct_manifest: manifest of the CTs, used so that X-rays of held-out CT patients are excluded from index, training and
            validation; None excludes no patient.
        batch_size: see `ManifestDataModule`.
        eval_batch_size: see `ManifestDataModule`.
        num_workers: see `ManifestDataModule`.
        cache_gb: see `ManifestDataModule`.
        seed: see `ManifestDataModule`.
        frontal_only: exclude views that are not frontal.
        language: language of the reports to use; None uses the most common one.
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
        """Return the facts of the X-ray manifest."""
        return {"xray": describe_manifest(self.manifest)}

    def pool(self) -> tuple[Manifest, dict[str, int]]:
        """Return the rows that index and expert may use, and the number of excluded rows by reason."""
        return leave_out_for_index(self.manifest, self.ct, frontal_only=self.frontal_only, language=self.language)

    def _choose_training_rows(self) -> Manifest:
        """Return the rows of `pool` that the expert trains on, with text if the stage needs it."""
        return self.with_text(self.pool()[0])

    def validation_rows(self) -> Manifest:
        """Return the `val` rows after the exclusions of `leave_out_for_validation`; may be empty."""
        return self.with_text(self._validation_pool()[0])

    def _validation_pool(self) -> tuple[Manifest, dict[str, int]]:
        language = self.training_language()
        return leave_out_for_validation(self.manifest, self.ct, frontal_only=self.frontal_only, language=language)

    def training_language(self) -> str | None:
        """Return the language of the training rows in lower case, or None if they name none."""
        return training_language(self.manifest, self.ct, frontal_only=self.frontal_only, language=self.language)

    def ct_reports(self) -> tuple[Manifest | None, dict[str, int]]:
        """Return the CT `train` rows whose reports the expert may use, and the excluded rows by reason.

        Rows of patients in the X-ray `val` and `test` splits, which evaluate the expert, and rows in another language
        than the training rows are excluded.

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
        """Return the number of rows excluded from training, validation and CT reports, by printable reason."""
        pool, counts = self.pool()
        silent = len(pool) - len(self.with_text(pool))
        if self.text == "required":
            counts["no report text"] = silent
        validation = {f"validation: {reason}": count for reason, count in self._validation_pool()[1].items()}
        reports = {f"CT train reports: {reason}": count for reason, count in self.ct_reports()[1].items()}
        return {**counts, **validation, **reports}

    def dataset(self, manifest: Manifest) -> ManifestDataset:
        """Return a dataset of radiographs of (part of) the manifest, preprocessed for the task's expert."""
        if self.preprocess is None:
            raise InputError("XrayDataModule: `preprocess` is not set; use it with the expert or the index task")
        return xray_dataset(manifest, self.preprocess, self.cache, self.preprocess_key)


def describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """Return path, fingerprint and counts of a manifest as JSON values."""
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
