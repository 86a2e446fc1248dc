"""What the explorer asks of a model, and what it gets: the seam to `ctx_distill.load`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.volume import Volume

Tell = Callable[[str], None]
"""Called with the name of the step that begins: `encoding`, `saliency`."""


@dataclass(frozen=True, eq=False)
class SaliencyMap:
    """Where in the scan a finding's value comes from.

    Attributes:
        values: (k0, k1, k2) float32, 0 and above.
        affine_lps: (4, 4), its index to LPS mm, as `Volume` has it.
    """

    values: NDArray[np.float32]
    affine_lps: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FindingAnswer:
    """Attributes:
    name: of the finding.
    value: 0 to 1.
    saliency: None where there is none.
    """

    name: str
    value: float
    saliency: SaliencyMap | None = None


@dataclass(frozen=True, eq=False)
class ShownXray:
    """An X-ray of the pool.

    Attributes:
        similarity: cosine.
        findings: read from its report; None where the index has none.
        study_id: None where the pool is not shown.
        report: likewise.
        picture: PNG bytes, likewise.
    """

    similarity: float
    findings: list[str] | None = None
    study_id: str | None = None
    report: str | None = None
    picture: bytes | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """Attributes:
    findings: of the scan.
    report: the draft; None where the model drafts none.
    neighbours: nearest first; None where there is no index.
    notes: what the reader of the page must know of this scan.
    """

    findings: list[FindingAnswer]
    report: str | None = None
    neighbours: list[ShownXray] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class About:
    """What stands under the results.

    Attributes:
        facts: name and value, in the order shown: the model, its data, the index.
    nearest: what "nearest" means here, in a sentence; "" without an index.
        shows_pool: whether reports and pictures of the pool are shown.
    """

    facts: dict[str, str]
    nearest: str = ""
    shows_pool: bool = False


class Reader(Protocol):
    """A model that is asked about one scan."""

    about: About

    def read(self, scan: Volume, tell: Tell) -> Answer:
        """The answer about a scan.

        Raises:
            InputError: the scan is no chest CT that the model can take.
        """
        ...


Opener = Callable[[Any], Reader]
