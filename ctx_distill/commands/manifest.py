"""`ctx-distill manifest`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ctx_distill.commands.parameters import Flat
from ctx_distill.sources.options import SourceOptions

Source = Literal["ct-rate", "rad-chestct", "mimic-cxr", "chexpert-plus", "padchest", "open-i", "dicom"]


def manifest(source: Source, root: Path, out: Path, /, *, options: Flat[SourceOptions] = SourceOptions()) -> None:
    """Write the manifest of a public data set, or of a folder of DICOM files.

    Args:
        source: The data set.
        root: Folder of the data set.
        out: Manifest to write, such as `ROOT/ct.csv`.
    """
    print(f"reading {root} ...", flush=True)
    from ctx_distill.sources.build_manifest import build_manifest

    print(build_manifest(source, root, out, options))
