"""What a frozen tower makes of a manifest row never changes: it is computed when the row is first seen.

Rows are computed one at a time. In a batch the last bits of a feature depend on the others in it, and a run that was
resumed meets a row in other company than one that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctx_distill.models.report_encoder import ReportEncoder


class RowFeatures:
    """Features that depend on a manifest row alone, bit for bit."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def __call__(self, rows: Sequence[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """(b, D) on the CPU.

        Args:
            rows: b manifest rows, at least one.
            compute: features (1, D) of the one place in `rows` that it is asked for; rows that are known are not.
        """
        for place, row in enumerate(rows):
            if row not in self._kept:
                self._kept[row] = compute([place])[0].cpu()
        return torch.stack([self._kept[row] for row in rows])


class ReportFeatures:
    """Reports, or views of them, as one frozen encoder embeds them.

    Args:
        encoder: of the reports; no part of the stage's checkpoints.
    """

    def __init__(self, encoder: ReportEncoder) -> None:
        self.encoder = encoder
        self._whole = RowFeatures()

    @torch.no_grad()
    def __call__(self, rows: Tensor, reports: Sequence[str], views: Sequence[str]) -> Tensor:
        """(b, D_t), unit rows; zero where there is no text.

        Args:
            rows: (b,) manifest rows.
            reports: b whole reports.
            views: b texts to embed; one that is the whole report is embedded once.
        """
        self.encoder.to(rows.device)
        numbers = rows.tolist()
        whole = [place for place, view in enumerate(views) if view and view == reports[place]]
        cut = [place for place, view in enumerate(views) if view and view != reports[place]]
        features = torch.zeros(len(numbers), self.encoder.text_dim or 0, device=rows.device)

        def embed(places: Sequence[int]) -> Tensor:
            return self.encoder.encode_text([views[place] for place in places])

        if whole:
            known = self._whole([numbers[place] for place in whole], lambda new: embed([whole[i] for i in new]))
            features[whole] = known.to(features)
        if cut:
            features[cut] = embed(cut).to(features)
        return features
