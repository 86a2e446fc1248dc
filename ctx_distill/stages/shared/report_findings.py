"""Extract the findings of CT reports for the findings re-rank, in the column order of the index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctx_distill.errors import InputError
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.text.extractor import extract_many, load_vocabulary


class FindingsReader:
    """Extract findings for `NeighbourLookup(findings_rerank=True, visible=reader.visible)`.

    Attributes:
        visible: (F,) bool, whether a finding is visible on an X-ray.
    """

    def __init__(self, store: XrayIndexArtefact, vocabulary: str) -> None:
        """Load the vocabulary.

        Args:
            store: An index with findings.
            vocabulary: Name or YAML file; must contain every finding of the index.

        Raises:
            InputError: The index has no findings, or has findings that the vocabulary lacks.
        """
        self._vocabulary = load_vocabulary(vocabulary)
        names, known = store.finding_names, self._vocabulary.names
        if not names:
            raise InputError(
                f"{store.folder}: the findings re-rank needs the pool's findings, but this index was built without them. "
                "Rebuild it with key text or both, or disable the re-rank."
            )
        if missing := [name for name in names if name not in known]:
            raise InputError(
                f"{store.folder}: the index has findings that the vocabulary {vocabulary} lacks: "
                f"{', '.join(missing[:5])}. Use the vocabulary that the index was built with, "
                f"{store.config.get('vocabulary')}."
            )
        self._columns = [known.index(name) for name in names]
        self.visible = torch.from_numpy(self._vocabulary.visible_on_xray[self._columns])

    def extract(self, reports: Sequence[str]) -> Tensor:
        """Return the findings of B reports, (B, F): 1 present, 0 absent, -1 uncertain, NaN not mentioned.

        Labels are never read.
        """
        return torch.from_numpy(extract_many(reports, self._vocabulary)[:, self._columns])
