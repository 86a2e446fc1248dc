"""Select the X-rays for the index, for training the expert, and for selecting its weights."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.errors import InputError

FRONTAL_VIEWS = frozenset({"", "frontal", "pa", "ap"})
"""Views (lower case) that count as frontal, including blank."""


class RowFilter:
    """Exclude rows of a manifest step by step and count the excluded rows by reason.

    A row is counted under the first reason that applies, so the counts and the remaining rows sum to all rows.

    Attributes:
        counts: number of excluded rows by printable reason.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.counts: dict[str, int] = {}
        self._keep: NDArray[np.bool_] = np.ones(len(manifest), dtype=bool)

    def exclude(self, reason: str, rows: NDArray[np.bool_]) -> None:
        """Exclude the rows where `rows` (N,) is true."""
        self.counts[reason] = int((self._keep & rows).sum())
        self._keep &= ~rows

    def exclude_patients(self, reason: str, patients: Collection[str]) -> None:
        """Exclude the rows of these patients."""
        self.exclude(reason, self.manifest.column("patient_id").isin(list(patients)).to_numpy(dtype=bool))

    def exclude_other_views(self) -> None:
        """Exclude views that are not frontal (`FRONTAL_VIEWS`, case-insensitive)."""
        view = self.manifest.column("view").str.strip().str.lower()
        self.exclude("not a frontal view", ~view.isin(FRONTAL_VIEWS).to_numpy(dtype=bool))

    def exclude_other_languages(self, language: str | None) -> None:
        """Exclude rows of other languages; keeps blank languages, and all rows if `language` is None."""
        if language:
            languages_of_rows = self._languages()
            self.exclude(f"language is not {language}", ~np.isin(languages_of_rows, ["", language]))

    def most_common_language(self) -> str | None:
        """Return the most common language of the remaining rows in lower case; ties by name."""
        languages_of_rows = self._languages()[self._keep]
        languages, counts = np.unique(languages_of_rows[languages_of_rows != ""], return_counts=True)
        return str(languages[counts.argmax()]) if len(languages) else None

    def _languages(self) -> NDArray[np.str_]:
        return np.array(self.manifest.column("language").str.strip().str.lower().tolist(), dtype=np.str_)

    def rows(self) -> Manifest:
        """Return the remaining rows with their original row numbers."""
        return self.manifest.where(self._keep)


def patients_of(manifest: Manifest | None, *splits: str) -> set[str]:
    """Return the patient ids of these splits; empty without a manifest."""
    if manifest is None:
        return set()
    return set(manifest.split(*splits).column("patient_id"))


def leave_out_for_index(
    xray: Manifest, ct: Manifest | None, *, frontal_only: bool = True, language: str | None = None
) -> tuple[Manifest, dict[str, int]]:
    """Return the X-rays for the index and for training the expert.

    These are frontal X-rays of split train in one language, of patients outside CT val and test.

    Args:
        xray: X-ray manifest.
        ct: CT manifest with patient ids of the same namespace; None excludes no patient.
        frontal_only: exclude views outside `FRONTAL_VIEWS` (case-insensitive).
        language: language to select; by default the most common one of the remaining X-rays. A blank language counts
            as this one.

    Returns:
        The remaining X-rays, and the number of excluded rows by printable reason. A row is counted under the first
        reason that applies, so the counts and the remaining rows sum to `len(xray)`.

    Raises:
        InputError: no row remains.
    """
    row_filter = _training_filter(xray, ct, frontal_only)
    row_filter.exclude_other_languages(_lower(language) or row_filter.most_common_language())
    remaining = row_filter.rows()
    if not len(remaining):
        reasons = ", ".join(f"{reason}: {n}" for reason, n in row_filter.counts.items())
        raise InputError(
            f"{xray.path}: none of the {len(xray)} X-rays can be used for index and expert ({reasons}); "
            "expected frontal X-rays of split train, of patients outside CT val and test"
        )
    return remaining, row_filter.counts


def training_language(xray: Manifest, ct: Manifest | None, *, frontal_only: bool, language: str | None) -> str | None:
    """Return the language that `leave_out_for_index` selects in lower case, or None if no X-ray has one."""
    return _lower(language) or _training_filter(xray, ct, frontal_only).most_common_language()


def leave_out_for_validation(
    xray: Manifest, ct: Manifest | None, *, frontal_only: bool, language: str | None
) -> tuple[Manifest, dict[str, int]]:
    """Return the X-rays for selecting an expert's weights.

    These are frontal X-rays of split val in the training language, of patients outside CT test. Patients of CT val are
    included, since that split serves model selection.

    Args:
        xray: X-ray manifest.
        ct: CT manifest; None excludes no patient.
        frontal_only: as in `leave_out_for_index`.
        language: language of the training rows, see `training_language`.

    Returns:
        The remaining X-rays (may be empty), and the number of excluded `val` rows by reason.
    """
    row_filter = RowFilter(xray.split("val"))
    row_filter.exclude_patients("patient is in CT test", patients_of(ct, "test"))
    if frontal_only:
        row_filter.exclude_other_views()
    row_filter.exclude_other_languages(language)
    return row_filter.rows(), row_filter.counts


def _training_filter(xray: Manifest, ct: Manifest | None, frontal_only: bool) -> RowFilter:
    row_filter = RowFilter(xray)
    row_filter.exclude("not in split train", (xray.column("split") != "train").to_numpy(dtype=bool))
    if ct is not None:
        row_filter.exclude_patients("patient is in CT val or test", patients_of(ct, "val", "test"))
    if frontal_only:
        row_filter.exclude_other_views()
    return row_filter


def _lower(language: str | None) -> str | None:
    return None if language is None else language.strip().lower()
