"""Which X-rays of a manifest the retrieval index may hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.manifest import Manifest
from ctx_distill.errors import InputError

FRONTAL_VIEWS = frozenset({"", "frontal", "pa", "ap"})
"""Views (lower case) that count as frontal; blank does."""


def leave_out_for_index(
    xray: Manifest, ct: Manifest, *, frontal_only: bool = True, language: str | None = None
) -> tuple[Manifest, dict[str, int]]:
    """The X-rays that the retrieval index holds: split train, no CT val or test patient, frontal, one language.

    A row is counted under the first reason that applies, so the counts and the number kept add up to `len(xray)`.

    Args:
        xray: the X-ray manifest.
        ct: the CT manifest, with patient ids out of the same space.
        frontal_only: take views of `FRONTAL_VIEWS` alone (case does not matter).
        language: the language to take; by default the most common of the X-rays otherwise taken. A blank language
            counts as that one.

    Returns:
        The X-rays kept, and for each reason (in words to print) how many it left out.

    Raises:
        InputError: nothing is left.
    """
    frame = xray.frame
    keep: NDArray[np.bool_] = np.ones(len(frame), dtype=bool)
    counts: dict[str, int] = {}

    def leave_out(reason: str, out: NDArray[np.bool_]) -> None:
        counts[reason] = int((keep & out).sum())
        keep[out] = False

    held_out = set(ct.frame.loc[ct.frame["split"].isin(("val", "test")), "patient_id"])
    leave_out("not in split train", (frame["split"] != "train").to_numpy(dtype=bool))
    leave_out("patient is in CT val or test", frame["patient_id"].isin(held_out).to_numpy(dtype=bool))
    if frontal_only:
        view = frame["view"].str.strip().str.lower()
        leave_out("not a frontal view", ~view.isin(FRONTAL_VIEWS).to_numpy(dtype=bool))
    spoken = frame["language"].str.strip().str.lower()
    wanted = language.strip().lower() if language is not None else None
    if wanted is None:
        named = spoken[keep & (spoken != "").to_numpy(dtype=bool)]
        # mode() sorts ties by name, so the choice does not depend on the order of the rows.
        wanted = str(named.mode().iloc[0]) if len(named) else None
    if wanted:
        leave_out(f"language is not {wanted}", ~spoken.isin(("", wanted)).to_numpy(dtype=bool))
    if not keep.any():
        reasons = ", ".join(f"{reason}: {n}" for reason, n in counts.items())
        raise InputError(
            f"{xray.path}: no X-ray of {len(xray)} is left for the index ({reasons}); "
            "expected frontal X-rays of split train, of patients outside CT val and test"
        )
    return xray.where(keep), counts
