"""The interface between the explorer and a model (`ctx_distill.load`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.volume import Volume

Tell = Callable[[str], None]
"""Callback with the name of the step that begins: `encoding` or `saliency`."""


@dataclass(frozen=True, eq=False)
class SaliencyMap:
    """The saliency map of a finding.

    Attributes:
        values: (k0, k1, k2) float32, non-negative.
        affine_lps: (4, 4), maps its index to LPS mm, as in `Volume`.
    """

    values: NDArray[np.float32]
    affine_lps: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FindingAnswer:
    """The result for one finding.

    Attributes:
        name: Name of the finding.
        value: Probability, 0 to 1.
        saliency: Saliency map, or None.
    """

    name: str
    value: float
    saliency: SaliencyMap | None = None


@dataclass(frozen=True, eq=False)
class ShownXray:
    """An X-ray of the pool.

    Attributes:
        similarity: Cosine similarity.
        findings: Findings extracted from its report; None if the index has none.
        study_id: Study id; None if the pool is not shown.
        report: Report; None if the pool is not shown.
        picture: PNG bytes; None if the pool is not shown.
    """

    similarity: float
    findings: list[str] | None = None
    study_id: str | None = None
    report: str | None = None
    picture: bytes | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """The results for a scan.

    Attributes:
        findings: Findings of the scan.
        report: Draft report; None if the model generates none.
        neighbours: X-rays, most similar first; None without an index.
        notes: Remarks on this scan for the user.
    """

    findings: list[FindingAnswer]
    report: str | None = None
    neighbours: list[ShownXray] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class About:
    """Information about the model.

    Attributes:
        facts: Facts by name, in display order: the model, its data, the index.
        nearest: a sentence that explains "nearest"; "" without an index.
        shows_pool: Whether reports and images of the pool are shown.
    """

    facts: dict[str, str]
    nearest: str = ""
    shows_pool: bool = False


class Reader(Protocol):
    """A model that evaluates scans."""

    about: About

    def read(self, scan: Volume, tell: Tell) -> Answer:
        """Return the results for a scan.

        Raises:
            InputError: The model cannot process the scan.
        """
        ...


Opener = Callable[[Any], Reader]
