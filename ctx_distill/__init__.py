"""ctx-distill: chest-CT understanding distilled from chest-X-ray experts. A research tool, not a medical device."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctx_distill.inference.model import CTModel

__version__ = "0.2.0"


def load(
    path: str | PathLike[str], *, index: str | PathLike[str] | None = None, vocabulary: str | None = None
) -> CTModel:
    """Open a run folder, or the artefact of a dual encoder or classifier, for use; see `CTModel.predict`.

    Args:
        path: a run folder, a stage's folder, or an artefact.
        index: folder of an X-ray index, for `CTModel.nearest`; default: that of the run.
        vocabulary: findings to query if the run names none: a shipped vocabulary or a file (default: ct-rate).

    Raises:
        InputError: the folder holds nothing usable, or its parts were not trained together.
    """
    from pathlib import Path

    from ctx_distill.inference.parts import open_parts

    place = None if index is None else Path(index)
    from ctx_distill.inference.model import CTModel

    return CTModel(open_parts(Path(path), vocabulary, place))
