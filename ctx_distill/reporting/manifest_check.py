"""`ctx-distill check`: read every image of a manifest in parallel, and write a table, a page and an exclusion list.

    OUT/rows.jsonl    one line per image, in the order of checking; an interrupted run resumes from it
    OUT/check.csv     the table: properties and faults of every image
    OUT/exclude.csv   images with errors: image_id, path, reason
    OUT/thumbnails/   slices of suspicious images
    OUT/index.html    the page

Rows are written to disk immediately and read as a stream, so memory does not grow with the number of images.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ctx_distill.data.io.radiograph import read_radiograph
from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.loading.prepared import PreparedFolder
from ctx_distill.data.manifests.image_paths import faults_by_place
from ctx_distill.data.manifests.index_rows import FRONTAL_VIEWS
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.data.quality.faults import Fault
from ctx_distill.data.quality.film import check_film
from ctx_distill.data.quality.scan import check_scan
from ctx_distill.data.quality.text import check_text, identical_texts
from ctx_distill.errors import InputError
from ctx_distill.files import hash_json, write_bytes, write_text
from ctx_distill.parallel import DIED, in_processes
from ctx_distill.reporting.check_page import CheckPage, build_check_page
from ctx_distill.reporting.label_faults import label_faults
from ctx_distill.reporting.pictures import ct_thumbnail, film_thumbnail
from ctx_distill.runs.run_folder import lock_run

THUMBNAILS = 200
"""Maximum thumbnails per kind of fault; the page shows fewer."""
_FILMS = (".png", ".jpg", ".jpeg", ".dcm")
_FACTS = (
    "shape",
    "spacing_mm",
    "orientation",
    "extent_mm",
    "hu_1",
    "hu_50",
    "hu_99",
    "lung_right_l",
    "lung_left_l",
    "content",
)
_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Image:
    """One image to check, as sent to worker processes."""

    row: int
    image_id: str
    source: ScanFile
    film: bool
    inverted: bool
    frontal: bool


def check_manifest(
    manifest_path: Path, out: Path | None, prepared: Path | None, workers: int | None
) -> tuple[str, int]:
    """Check every image, and write table, page and exclusion list.

    Returns:
        Counts as lines to print, and the number of images with errors.

    Raises:
        InputError: The manifest is invalid, or the output cannot be written.
    """
    manifest = read_manifest(manifest_path, check_images=False)
    out = out or manifest_path.with_suffix(".check")
    folder = PreparedFolder.standing(prepared) if prepared else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_run(out, f"ctx-distill check {manifest_path}"):
            _check_images(manifest, out, folder, workers)
            return _conclude(manifest, out)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}). Set another folder with --out."
        ) from error


def _check_images(manifest: Manifest, out: Path, folder: PreparedFolder | None, workers: int | None) -> None:
    frame = manifest.frame
    roots = frame["root"].tolist() if "root" in frame.columns else [""] * len(frame)
    unreachable, no_folders = faults_by_place(manifest.path.parent, roots, frame["image_path"].tolist())
    unreachable |= {
        place: (f"{roots[place]!r}, which is not a folder", "correct the column root")
        for place in range(len(roots)) if roots[place] in no_folders.values()
    }  # fmt: skip
    rows = out / "rows.jsonl"
    prior = _standing_rows(rows)
    pictured: Counter[str] = Counter()
    images = []
    with rows.open("a", encoding="utf-8") as file:
        for place, row in enumerate(int(row) for row in frame.index):
            image = _image(manifest, row)
            if place in unreachable:
                problem, remedy = unreachable[place]
                _append(file, image, _unreadable(f"image_path: found {problem}; {remedy}"))
                continue
            before = prior.get(image.image_id)
            if before is not None and before == _key(image, folder):
                continue
            images.append(image)
        work = partial(_check_one, folder)
        title = f"checking {manifest.path.name}"
        for image, (record, picture) in in_processes(title, work, images, len(images), workers, died=_died):
            codes = [fault["code"] for fault in record["faults"] if fault["severity"] != "note"]
            if picture is not None and any(pictured[code] < THUMBNAILS for code in codes):
                name = _thumbnail_name(image.image_id)
                write_bytes(out / name, picture)
                record["thumbnail"] = name
                pictured.update(codes)
            _append(file, image, record)


def _append(file: io.TextIOWrapper, image: Image, record: dict[str, Any]) -> None:
    line = {"image_id": image.image_id, "path": str(image.source.path), **record}
    file.write(json.dumps(line, allow_nan=False) + "\n")
    file.flush()


def _image(manifest: Manifest, row: int) -> Image:
    source = manifest.scan_file(row)
    view = str(manifest.frame.at[row, "view"]).strip().lower()
    film = source.path.suffix.lower() in _FILMS and not source.path.is_dir()
    return Image(
        row, str(manifest.frame.at[row, "image_id"]), source, film, manifest.inverted(row), view in FRONTAL_VIEWS
    )


def _key(image: Image, folder: PreparedFolder | None) -> str:
    """Return the key of a check; an image with another file, override or prepared folder is checked again."""
    try:
        stamp = image.source.stamp()
    except InputError:
        return ""
    what = [1, str(image.source.path), stamp, image.inverted, image.frontal, folder and str(folder.folder.resolve())]
    return hash_json(what)[:24]


def _check_one(folder: PreparedFolder | None, image: Image) -> tuple[dict[str, Any], bytes | None]:
    """Return the row of an image and, if it is suspicious, a thumbnail."""
    key = _key(image, folder)
    try:
        if image.film:
            facts, faults, film = check_film(image.source.path, image.inverted, image.frontal)
            show = partial(film_thumbnail, film)
        else:
            facts, faults, scan = check_scan(image.source)
            show = partial(ct_thumbnail, scan)
    except InputError as error:
        return _unreadable(str(error)), None
    if folder is not None and not image.film:
        try:
            PreparedFolder(folder.folder, folder.spec, folder.projection).read(image.image_id, image.source)
        except InputError as error:
            faults.append(Fault("error", "prepared", str(error)))
            key = ""
    picture = show() if any(fault.severity != "note" for fault in faults) else None
    return {"key": key, "facts": facts, "faults": [asdict(fault) for fault in faults]}, picture


def _unreadable(reason: str) -> dict[str, Any]:
    """Return the row of an unreadable image, which the next run checks again."""
    return {"key": "", "facts": {}, "faults": [asdict(Fault("error", "unreadable", reason))]}


def _died(image: Image) -> tuple[dict[str, Any], bytes | None]:
    return _unreadable(f"{image.source.path}: the process that read it {DIED}"), None


def _thumbnail_name(image_id: str) -> str:
    return f"thumbnails/{hash_json(image_id)[:24]}.jpg"


def _picture(image: Image) -> bytes:
    """Return a thumbnail of an image that has already been read without faults."""
    if image.film:
        return film_thumbnail(read_radiograph(image.source.path, image.inverted))
    return ct_thumbnail(image.source.read())


def _standing_rows(path: Path) -> dict[str, str]:
    """Return the keys by image id from an earlier run; a truncated last line is removed, and repeated rows keep the last."""
    if not path.is_file():
        return {}
    keys: dict[str, str] = {}
    complete_bytes = 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                keys[str(record["image_id"])] = str(record.get("key", ""))
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            complete_bytes += len(line)
    with path.open("rb+") as file:
        file.truncate(complete_bytes)
    return {image: key for image, key in keys.items() if key}


def _conclude(manifest: Manifest, out: Path) -> tuple[str, int]:
    """Write table, list and page from the rows on disk, adding faults that involve several images."""
    frame = manifest.frame
    people = dict(zip(frame["image_id"], zip(frame["patient_id"], frame["split"], strict=True), strict=True))
    reports = {image: manifest.report(int(row)) for row, image in zip(frame.index, frame["image_id"], strict=True)}
    rows = {str(image): int(row) for row, image in zip(frame.index, frame["image_id"], strict=True)}
    alike = identical_texts((image, people[image][0], report) for image, report in reports.items())
    copies, contradicted = _copies(out, people), label_faults(manifest)
    page = CheckPage(str(manifest.path), len(frame))
    excluded = []
    table = out / ".check.csv.part"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image_id", "patient_id", "split", "path", "errors", "warnings", "notes", *_FACTS])
        for record in _rows(out, people):
            image, facts = record["image_id"], record["facts"]
            faults = [Fault(**fault) for fault in record["faults"]] + check_text(reports[image])
            faults += [fault for fault in (copies.get(image), alike.get(image), contradicted.get(image)) if fault]
            by = {name: "; ".join(f"{f.code}: {f.text}" for f in faults if f.severity == name) for name in _ORDER}
            properties = [
                json.dumps(facts[name]) if isinstance(facts.get(name), list) else facts.get(name, "") for name in _FACTS
            ]
            writer.writerow([image, *people[image], record["path"], *by.values(), *properties])
            if by["error"]:
                excluded.append((image, record["path"], by["error"]))
            faults.sort(key=lambda fault: _ORDER[fault.severity])
            picture = out / record["thumbnail"] if "thumbnail" in record else None
            if picture is None and image in copies and page.wants(copies[image]):
                picture = out / _thumbnail_name(image)
                write_bytes(picture, _picture(_image(manifest, rows[image])))
            page.add(image, record["path"], facts, faults, picture)
    table.replace(out / "check.csv")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image_id", "path", "reason"), *excluded])
    write_text(out / "exclude.csv", text.getvalue())
    written = build_check_page(out, page)
    lines = [f"{manifest.path}: {len(frame):,} images, {page.with_severity['error']:,} with errors, "
             f"{page.with_severity['warning']:,} with warnings, {page.with_severity['note']:,} with notes"]  # fmt: skip
    lines += [f"  {severity}, {code}: {count:,}" for (severity, code), count in page.counted()]
    lines += [f"  table {out / 'check.csv'}, page {written}, to exclude {out / 'exclude.csv'}"]
    return "\n".join(lines), len(excluded)


def _rows(out: Path, images: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the last row of each image in the manifest's order; the file is in the order of checking."""
    last: dict[str, int] = {}
    with (out / "rows.jsonl").open("rb") as file:
        place = 0
        for line in file:
            last[json.loads(line)["image_id"]] = place
            place += len(line)
        for image in images:
            if image in last:
                file.seek(last[image])
                yield json.loads(file.readline())


def _copies(out: Path, people: dict[str, tuple[str, str]]) -> dict[str, Fault]:
    """Return faults of duplicated images: an error between patients, a warning within one patient."""
    seen: dict[str, list[str]] = {}
    for record in _rows(out, people):
        if content := record["facts"].get("content"):
            seen.setdefault(content, []).append(record["image_id"])
    faults = {}
    for several in (images for images in seen.values() if len(images) > 1):
        patients = {people[image][0] for image in several}
        splits = ", ".join(sorted({people[image][1] for image in several}))
        for image in several:
            other = next(name for name in several if name != image)
            text = f"the same voxels as {other}"
            if len(patients) > 1:
                text += f", of another patient{f', in splits {splits}' if ',' in splits else ''}"
            faults[image] = Fault("error" if len(patients) > 1 else "warning", "duplicate", text)
    return faults
