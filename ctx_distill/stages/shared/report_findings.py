"""Reads CT reports for the findings re-rank, in the columns of the index's findings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctx_distill.errors import InputError
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.text.extractor import extract_many, load_vocabulary


class FindingsReader:
    """Findings of CT reports as `NeighbourLookup(findings_rerank=True, visible=reader.visible)` compares them.

    Attributes:
        visible: (F,) bool, the findings that an X-ray shows.
    """

    def __init__(self, store: XrayIndexArtefact, vocabulary: str) -> None:
        """Take the vocabulary.

        Args:
            store: an index with findings.
            vocabulary: name or YAML file; holds every finding of the index.

        Raises:
            InputError: the index holds no findings, or some that the vocabulary does not.
        """
        self._vocabulary = load_vocabulary(vocabulary)
        names, known = store.finding_names, self._vocabulary.names
        if not names:
            raise InputError(
                f"{store.folder}: the findings re-rank needs the pool's findings, and this index was built without. "
                "Build it again with key text or both, or switch the re-rank off."
            )
        if missing := [name for name in names if name not in known]:
            raise InputError(
                f"{store.folder}: the index holds findings that the vocabulary {vocabulary} does not: "
                f"{', '.join(missing[:5])}. Give the vocabulary that the index was built with, "
                f"{store.config.get('vocabulary')}."
            )
        self._columns = [known.index(name) for name in names]
        self.visible = torch.from_numpy(self._vocabulary.visible_on_xray[self._columns])

    def extract(self, reports: Sequence[str]) -> Tensor:
        """(B, F) of B reports: 1 present, 0 absent, -1 uncertain, NaN not mentioned; never from labels."""
        return torch.from_numpy(extract_many(reports, self._vocabulary)[:, self._columns])
