"""Build a manifest of MIMIC-CXR-JPG with the reports of MIMIC-CXR (Johnson et al. 2019).

It has views, the published split, and labels of 1, 0 or -1. The authors of the JPEGs have inverted MONOCHROME1.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

from ctx_distill.data.manifests.tables import Table, parse_csv
from ctx_distill.errors import InputError
from ctx_distill.sources.options import SourceOptions
from ctx_distill.sources.rows import Built, ManifestRow, label_value, one_split_per_patient, present
from ctx_distill.text.sections import cut_report

_SPLITS = {"train": "train", "validate": "val", "test": "test"}
_KEYS = ("subject_id", "study_id")


def build(root: Path, options: SourceOptions) -> Built:
    """Return the rows of all existing films, with reports from `files/p10/p10000032/s50414267.txt` if available.

    `--reports FOLDER` names another folder that contains `files/` with the reports, which are a separate download.

    Raises:
        InputError: a table is missing or is not that of MIMIC-CXR-JPG.
    """
    built = Built("mimic-cxr", root)
    metadata = _gz(root, "metadata", "dicom_id", "subject_id", "study_id", "ViewPosition")
    split = _gz(root, "split", "dicom_id", "split")
    split_of = dict(zip(split.columns["dicom_id"], split.columns["split"], strict=True))
    chexpert = _gz(root, "chexpert", *_KEYS)
    names = [name for name in chexpert.columns if name not in _KEYS]
    labels_of = {
        study: {name.lower(): label_value(chexpert.path, name, chexpert.columns[name][place]) for name in names}
        for place, study in enumerate(chexpert.columns["study_id"])
    }
    texts: dict[str, tuple[str, str]] = {}
    for place, dicom in enumerate(metadata.columns["dicom_id"]):
        patient, study = (metadata.columns[name][place] for name in _KEYS)
        folder = Path("files") / f"p{patient[:2]}" / f"p{patient}" / f"s{study}"
        if split_of.get(dicom) not in _SPLITS:
            built.left_out["not in the split table"] += 1
            continue
        row = ManifestRow(
            f"s{study}", f"p{patient}", _SPLITS[split_of[dicom]], folder / f"{dicom}.jpg", dicom,
            view=_view(metadata.columns["ViewPosition"][place]), labels=labels_of.get(study, {}),
        )  # fmt: skip
        if not present(built, [row]):
            continue
        if study not in texts:
            texts[study] = _report((options.reports or root) / folder.with_suffix(".txt"))
        row.findings, row.impression = texts[study]
        built.rows.append(row)
    one_split_per_patient(built)
    return built


def _report(path: Path) -> tuple[str, str]:
    return cut_report(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ("", "")


def _view(position: str) -> str:
    """Return PA, AP, `lateral` (LATERAL and LL) or `other` (oblique, unknown), which never counts as frontal."""
    name = position.strip().upper()
    return name if name in ("PA", "AP") else "lateral" if name in ("LATERAL", "LL") else "other"


def _gz(root: Path, name: str, *columns: str) -> Table:
    for path in sorted(root.glob(f"mimic-cxr-2*-{name}.csv*")):
        try:
            packed = path.read_bytes()
            text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8-sig")
            contents = parse_csv(path, io.StringIO(text, newline=""))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise InputError(f"{path}: cannot read the file ({error}); download it again") from error
        missing = [column for column in columns if column not in contents.columns]
        if missing:
            raise InputError(f"{path}: missing column {', '.join(missing)}; expected the table of MIMIC-CXR-JPG")
        return contents
    raise InputError(f"{root}: no mimic-cxr-2.0.0-{name}.csv.gz; expected the root of MIMIC-CXR-JPG")
