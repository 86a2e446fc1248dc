"""Which X-rays of a manifest the index holds and the expert is trained on, and which choose its weights."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.errors import InputError

FRONTAL_VIEWS = frozenset({"", "frontal", "pa", "ap"})
"""Views (lower case) that count as frontal; blank does."""


class RowFilter:
    """The rows of a manifest that no exclusion has removed yet, and how many rows each exclusion removed.

    A row is counted under the first reason that applies, so the counts and the rows kept add up to the rows given.

    Attributes:
        counts: rows removed, by reason (in words to print).
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.counts: dict[str, int] = {}
        self._keep: NDArray[np.bool_] = np.ones(len(manifest), dtype=bool)

    def exclude(self, reason: str, rows: NDArray[np.bool_]) -> None:
        """Remove the rows where `rows` (N,) is true."""
        self.counts[reason] = int((self._keep & rows).sum())
        self._keep &= ~rows

    def exclude_patients(self, reason: str, patients: Collection[str]) -> None:
        """Remove the rows of these patients."""
        self.exclude(reason, self.manifest.column("patient_id").isin(list(patients)).to_numpy(dtype=bool))

    def exclude_other_views(self) -> None:
        """Remove views that are not frontal (`FRONTAL_VIEWS`, in any case)."""
        view = self.manifest.column("view").str.strip().str.lower()
        self.exclude("not a frontal view", ~view.isin(FRONTAL_VIEWS).to_numpy(dtype=bool))

    def exclude_other_languages(self, language: str | None) -> None:
        """Remove rows of another language; a blank language counts as the one given, None removes nothing."""
        if language:
            named = self._languages()
            self.exclude(f"language is not {language}", ~np.isin(named, ["", language]))

    def most_common_language(self) -> str | None:
        """The most common language of the rows that are left, in lower case; the first by name among equals."""
        named = self._languages()[self._keep]
        languages, counts = np.unique(named[named != ""], return_counts=True)
        return str(languages[counts.argmax()]) if len(languages) else None

    def _languages(self) -> NDArray[np.str_]:
        return np.array(self.manifest.column("language").str.strip().str.lower().tolist(), dtype=np.str_)

    def rows(self) -> Manifest:
        """The rows that are left, under their original row numbers."""
        return self.manifest.where(self._keep)


def patients_of(manifest: Manifest | None, *splits: str) -> set[str]:
    """Patient ids of these splits; none without a manifest."""
    if manifest is None:
        return set()
    return set(manifest.split(*splits).column("patient_id"))


def leave_out_for_index(
    xray: Manifest, ct: Manifest | None, *, frontal_only: bool = True, language: str | None = None
) -> tuple[Manifest, dict[str, int]]:
    """The X-rays of the index and of the expert's training: split train, no CT val or test patient, frontal, one language.

    Args:
        xray: the X-ray manifest.
        ct: the CT manifest, with patient ids out of the same space; None excludes no patient.
        frontal_only: take views of `FRONTAL_VIEWS` alone (case does not matter).
        language: the language to take; by default the most common of the X-rays otherwise taken. A blank language
            counts as that one.

    Returns:
        The X-rays kept, and for each reason (in words to print) how many rows it removed. A row is counted under the
        first reason that applies, so the counts and the number kept add up to `len(xray)`.

    Raises:
        InputError: nothing is left.
    """
    chosen = _training_filter(xray, ct, frontal_only)
    chosen.exclude_other_languages(_lower(language) or chosen.most_common_language())
    kept = chosen.rows()
    if not len(kept):
        reasons = ", ".join(f"{reason}: {n}" for reason, n in chosen.counts.items())
        raise InputError(
            f"{xray.path}: no X-ray of {len(xray)} is left for index and expert ({reasons}); "
            "expected frontal X-rays of split train, of patients outside CT val and test"
        )
    return kept, chosen.counts


def training_language(xray: Manifest, ct: Manifest | None, *, frontal_only: bool, language: str | None) -> str | None:
    """The language that `leave_out_for_index` takes, in lower case; None where no X-ray names one."""
    return _lower(language) or _training_filter(xray, ct, frontal_only).most_common_language()


def leave_out_for_validation(
    xray: Manifest, ct: Manifest | None, *, frontal_only: bool, language: str | None
) -> tuple[Manifest, dict[str, int]]:
    """The X-rays that may choose an expert's weights: split val, no CT test patient, frontal, the training's language.

    Patients of CT `val` stay in: that split is there to choose by.

    Args:
        xray: the X-ray manifest.
        ct: the CT manifest; None excludes no patient.
        frontal_only: as `leave_out_for_index`.
        language: the language of the training rows, see `training_language`.

    Returns:
        The X-rays kept, which may be none, and how many rows of split val each reason removed.
    """
    chosen = RowFilter(xray.split("val"))
    chosen.exclude_patients("patient is in CT test", patients_of(ct, "test"))
    if frontal_only:
        chosen.exclude_other_views()
    chosen.exclude_other_languages(language)
    return chosen.rows(), chosen.counts


def _training_filter(xray: Manifest, ct: Manifest | None, frontal_only: bool) -> RowFilter:
    chosen = RowFilter(xray)
    chosen.exclude("not in split train", (xray.column("split") != "train").to_numpy(dtype=bool))
    if ct is not None:
        chosen.exclude_patients("patient is in CT val or test", patients_of(ct, "val", "test"))
    if frontal_only:
        chosen.exclude_other_views()
    return chosen


def _lower(language: str | None) -> str | None:
    return None if language is None else language.strip().lower()
