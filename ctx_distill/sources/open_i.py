"""Build a manifest of Open-I, the Indiana University collection (Demner-Fushman et al. 2016).

The reports are XML files in a tgz archive, which is read without unpacking.
"""

from __future__ import annotations

import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ctx_distill.errors import InputError
from ctx_distill.sources.options import SourceOptions
from ctx_distill.sources.rows import Built, ManifestRow, hashed_split, table
from ctx_distill.text.sections import without_marks

ARCHIVE = "NLMCXR_reports.tgz"
_IMAGE_FOLDERS = ("NLMCXR_png", "images", "images/images_normalized", ".")
_MAX_XML = 1 << 20


@dataclass(frozen=True)
class OpenIReport:
    """One report.

    Attributes:
        uid: identifier, such as CXR1.
        findings: text without de-identification marks; "" if the section is empty.
        impression: likewise.
        images: names of its films without suffix, in the report's order.
        mesh: published terms of MeSH/major ("Cardiomegaly/mild", "normal").
        automatic: published terms of MeSH/automatic.
    """

    uid: str
    findings: str
    impression: str
    images: tuple[str, ...]
    mesh: tuple[str, ...]
    automatic: tuple[str, ...]


def read_reports(path: Path) -> Iterator[OpenIReport]:
    """Yield the reports of the published archive, or of its unpacked folder, ordered by uid.

    Raises:
        InputError: no report, a damaged archive, or an XML file that is not a report.
    """
    reports = sorted((parse_report(name, text) for name, text in _documents(path)), key=lambda r: (len(r.uid), r.uid))
    if not reports:
        raise InputError(f"{path}: no XML report; expected {ARCHIVE} of Open-I, or its folder ecgen-radiology")
    yield from reports


def _documents(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*.xml")):
            yield str(file), file.read_bytes()
        return
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".xml") and member.size <= _MAX_XML:
                    handle = archive.extractfile(member)
                    assert handle is not None
                    yield f"{path}: {member.name}", handle.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(
            f"{path}: cannot read the archive ({error}); expected {ARCHIVE} of Open-I, download it again"
        ) from error


def parse_report(name: str, text: bytes) -> OpenIReport:
    """Parse one XML report; `name` is for messages.

    Raises:
        InputError: the XML is not well-formed, declares entities, or has no uId.
    """
    # Entities can expand 1 kB of XML to gigabytes; these reports have none.
    if b"<!ENTITY" in text or b"<!DOCTYPE" in text:
        raise InputError(f"{name}: declares a document type or entities; expected a plain report of Open-I")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise InputError(f"{name}: not well-formed XML ({error}); unpack the archive again") from error
    uid = root.find("uId")
    if uid is None or not uid.get("id"):
        raise InputError(f"{name}: no uId; expected a report of Open-I")
    sections = {part.get("Label", ""): part.text or "" for part in root.iter("AbstractText")}
    return OpenIReport(
        str(uid.get("id")),
        without_marks(sections.get("FINDINGS", "")),
        without_marks(sections.get("IMPRESSION", "")),
        tuple(str(image.get("id")) for image in root.iter("parentImage")),
        tuple((term.text or "").strip() for term in root.iterfind("MeSH/major")),
        tuple((term.text or "").strip() for term in root.iterfind("MeSH/automatic")),
    )


def build(root: Path, options: SourceOptions) -> Built:
    """Return the rows of all existing films, from the archive (or its folder) and the PNGs in ROOT, NLMCXR_png or images.

    Neither XML nor PNG defines which film is frontal. `indiana_projections.csv` (filename, projection) is used if it is in
    ROOT. `--first-is-frontal` assumes that the first film of a report is frontal and the others are lateral. Otherwise the
    view is `unknown`, and the index excludes the film. The collection has one report per patient, so the report's uid
    serves as patient id; its hash determines the split (`--val`, `--test`).

    Raises:
        InputError: no reports, or damaged reports.
    """
    built = Built("open-i", root)
    # The archive is often stored with the name of the data set as prefix.
    source = next(
        (path for name in (ARCHIVE, "ecgen-radiology", f"*{ARCHIVE}") for path in sorted(root.glob(name))), root
    )
    folder = next((Path(name) for name in _IMAGE_FOLDERS if any((root / name).glob("CXR*.png"))), Path())
    views = _projections(root)
    for report in read_reports(source):
        for place, image in enumerate(report.images):
            path = folder / f"{image}.png"
            if not (root / path).is_file():
                built.left_out["image file does not exist"] += 1
                continue
            guess = ("frontal" if place == 0 else "lateral") if options.first_is_frontal else "unknown"
            built.rows.append(
                ManifestRow(
                    report.uid, report.uid, hashed_split("open-i", report.uid, options.val, options.test), path, image,
                    report.findings, report.impression, view=views.get(image, guess),
                )
            )  # fmt: skip
        if not report.images:
            built.left_out["report without a film"] += 1
    unknown = sum(row.view == "unknown" for row in built.rows)
    if unknown:
        built.notes.append(
            f"the view of {unknown:,} films is unknown, and the index excludes them; add indiana_projections.csv to ROOT,"
            " or use --first-is-frontal"
        )
    return built


def _projections(root: Path) -> dict[str, str]:
    path = root / "indiana_projections.csv"
    if not path.is_file():
        return {}
    read = table(path, "uid", "filename", "projection")
    views: dict[str, str] = {}
    for uid, name, projection in zip(*(read.columns[c] for c in ("uid", "filename", "projection")), strict=True):
        # 2_IM-0652-1001.dcm.png is CXR2_IM-0652-1001 in the archive, and 1_IM-0001-3001.dcm.png is CXR1_1_IM-0001-3001.
        stem = name.split(".")[0]
        views |= dict.fromkeys((f"CXR{stem}", f"CXR{uid.strip()}_{stem}"), projection.strip().lower())
    return views
