"""Implement `ctx-distill manifest`: run the builder of a source and write the manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ctx_distill.errors import InputError
from ctx_distill.sources import chexpert_plus, ct_rate, mimic_cxr, open_i, padchest, rad_chestct
from ctx_distill.sources import dicom_tree as dicom
from ctx_distill.sources.options import SourceOptions
from ctx_distill.sources.pseudonyms import read_or_make_key
from ctx_distill.sources.rows import Built, write_manifest

BUILDERS: dict[str, Callable[[Path, SourceOptions], Built]] = {
    "ct-rate": ct_rate.build,
    "rad-chestct": rad_chestct.build,
    "mimic-cxr": mimic_cxr.build,
    "chexpert-plus": chexpert_plus.build,
    "padchest": padchest.build,
    "open-i": open_i.build,
}
DEFAULT_KEY = Path("~/.config/ctx-distill/key")


def build_manifest(source: str, root: Path, out: Path, options: SourceOptions) -> str:
    """Write the manifest OUT of the data set in ROOT, and return a summary to print.

    Raises:
        InputError: ROOT is not the data set, or no row remains.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected the data set {source}")
    if not (0 <= options.val < 1 and 0 <= options.test < 1 and options.val + options.test < 1):
        raise InputError(
            f"--val {options.val} --test {options.test}: expected non-negative shares whose sum is below 1"
        )
    if source == "dicom":
        key = None
        if not options.keep_ids:
            place = options.key or DEFAULT_KEY.expanduser()
            new = not place.exists()
            key = read_or_make_key(place, out)
        built = dicom.build(root, options, key)
        if key is not None:
            action = "created" if new else "read"
            built.notes.append(
                f"ids are hashed with the key {action} at {place}; store it separately from the manifest"
            )
        return write_manifest(built, out)
    return write_manifest(BUILDERS[source](root, options), out)
