"""What a manifest refuses and in which words, what it normalises, and whom the index leaves out."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ctx_distill.data.manifests.index_rows import leave_out_for_index
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.types import InputError

Row = Mapping[str, object]


def rows(**changes: object) -> list[dict[str, object]]:
    """Three patients; `changes` go into the second row, which is row 3 in an editor."""
    table: list[dict[str, object]] = [
        {
            "study_id": f"s{i}", "patient_id": f"p{i}", "split": split, "image_path": f"x/{i}.png",
            "findings": f"Finding {i}.", "impression": f"Impression {i}.",
        }
        for i, split in enumerate(("train", "val", "test"))
    ]  # fmt: skip
    table[1].update(changes)
    return table


def write(folder: Path, table: Sequence[Row], name: str = "ct.csv", images: bool = True) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    columns = list(dict.fromkeys(key for row in table for key in row))
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(table)
    (folder / "x").mkdir(exist_ok=True)
    for i in range(3 if images else 0):
        Image.new("L", (4, 4), 9).save(folder / "x" / f"{i}.png")
    return path


def refused(path: Path, *words: str, check_images: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        read_manifest(path, check_images=check_images)
    message = str(caught.value)
    for word in (str(path), *words):
        assert word in message, message
    return message


def test_reads_and_normalises(tmp_path: Path) -> None:
    table = rows(
        study_id=" 007 ", patient_id="NA", findings="Two\nlines, and a  comma.", impression="", view="PA", language="en",
        extra="ignored",
    )  # fmt: skip
    table[0].update({"label:b": "1.0", "label:a": -1})
    table[1].update({"label:b": "", "label:a": "0"})
    manifest = read_manifest(write(tmp_path, table))
    assert len(manifest) == 3
    assert manifest.finding_names == ("b", "a")
    np.testing.assert_array_equal(manifest.labels(), np.array([[1, -1], [np.nan, 0], [np.nan, np.nan]], np.float32))
    assert manifest.labels().dtype == np.float32
    assert manifest.frame.at[1, "study_id"] == "007"
    assert manifest.frame.at[1, "patient_id"] == "NA"
    assert manifest.frame.at[1, "image_id"] == "007"
    assert manifest.frame.at[0, "view"] == ""
    assert manifest.report(1) == "Two lines, and a comma."
    assert manifest.report(0) == "Finding 0. Impression 0."
    assert manifest.image_file(2) == tmp_path / "x/2.png"
    assert "extra" not in manifest.frame


def test_without_labels(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, rows()))
    assert manifest.finding_names == ()
    assert manifest.labels().shape == (3, 0)


def test_split_keeps_row_numbers_and_codes(tmp_path: Path) -> None:
    table = [dict(row, image_id=f"i{i}") for i, row in enumerate([*rows(), *rows()])]
    whole = read_manifest(write(tmp_path, table))
    part = whole.split("test", "val")
    assert list(part.frame.index) == [1, 2, 4, 5]
    assert part.image_file(5) == whole.image_file(5)
    assert list(whole.study_codes()) == [0, 1, 2, 0, 1, 2]
    assert list(part.study_codes()) == [1, 2, 1, 2]
    assert part.fingerprint != whole.fingerprint
    assert whole.split("train", "val", "test").fingerprint == whole.fingerprint
    with pytest.raises(InputError, match="valid"):
        whole.split("valid")


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    base = read_manifest(write(tmp_path / "a", rows())).fingerprint
    assert read_manifest(write(tmp_path / "b", rows(), name="other.csv")).fingerprint == base
    seen = {base}
    for change in (
        {"findings": "Finding 1. "}, {"findings": "Finding 1!"}, {"split": "test"}, {"label:a": "1"}, {"label:b": "1"},
        {"label:a": "0"}, {"view": "PA"}, {"findings": "Finding 1.Imp", "impression": "ression 1."},
    ):  # fmt: skip
        seen.add(read_manifest(write(tmp_path / "c", rows(**change))).fingerprint)
    assert len(seen) == 8  # the space at the end is normalised away


def test_parquet_reads_like_csv(tmp_path: Path) -> None:
    table = rows(findings=None)
    table[0]["label:a"] = "1"
    reference = read_manifest(write(tmp_path, table))
    frame = pd.DataFrame(table)
    frame["label:a"] = [1.0, np.nan, np.nan]
    frame.to_parquet(tmp_path / "ct.parquet")
    manifest = read_manifest(tmp_path / "ct.parquet")
    assert manifest.fingerprint == reference.fingerprint
    frame["study_id"] = [1, 2, 3]
    frame.to_parquet(tmp_path / "ct.parquet")
    assert list(read_manifest(tmp_path / "ct.parquet").frame["study_id"]) == ["1", "2", "3"]
    frame["study_id"] = [1.0, 2.0, 3.0]
    frame.to_parquet(tmp_path / "ct.parquet")
    refused(tmp_path / "ct.parquet", "study_id", "strings")
    frame["study_id"], frame["label:a"] = ["1", "2", "3"], [1.0, 0.5, np.nan]
    frame.to_parquet(tmp_path / "ct.parquet")
    refused(tmp_path / "ct.parquet", "row 2", "label:a", "0.5")
    (tmp_path / "ct.parquet").write_bytes(b"PAR1 nothing")
    refused(tmp_path / "ct.parquet", "Parquet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "valid"}, ("row 3", "'split'", "'valid'", "train, val or test")),
        ({"split": ""}, ("row 3", "'split'")),
        ({"study_id": ""}, ("row 3", "'study_id'", "nothing")),
        ({"patient_id": " "}, ("row 3", "'patient_id'")),
        ({"patient_id": "p0"}, ("row 3", "'split'", "'p0'", "row 2")),
        ({"patient_id": "p0 "}, ("row 3", "'split'", "'p0'", "row 2")),
        ({"study_id": "s0"}, ("row 3", "'study_id'", "image_id")),
        ({"image_id": "s0"}, ("image_id",)),
        ({"label:a": "2"}, ("row 3", "'label:a'", "'2'", "-1 (uncertain)")),
        ({"label:a": "yes"}, ("row 3", "'label:a'", "'yes'")),
        ({"label:a": "nan"}, ("row 3", "'label:a'", "'nan'")),
        ({"label:": "1"}, ("label:",)),
        ({"image_path": ""}, ("row 3", "'image_path'")),
        ({"image_path": "/etc/passwd"}, ("row 3", "absolute")),
        ({"image_path": "C:\\scans\\1.png"}, ("row 3", "absolute")),
        ({"image_path": "s3://bucket/1.png"}, ("row 3", "absolute")),
        ({"image_path": "~/1.png"}, ("row 3", "absolute")),
        ({"image_path": "../1.png"}, ("row 3", "leaves")),
        ({"image_path": "x/../../1.png"}, ("row 3", "leaves")),
        ({"image_path": "x/none.png"}, ("row 3", "does not exist")),
        ({"image_path": "x"}, None),
    ],
)
def test_one_fault(tmp_path: Path, change: Row, words: tuple[str, ...] | None) -> None:
    path = write(tmp_path, rows(**change))
    if words is None:
        read_manifest(path)  # a folder with files, as DICOM slices are
    else:
        refused(path, *words)


def test_a_study_of_two_patients(tmp_path: Path) -> None:
    table = [dict(row, image_id=f"i{i}") for i, row in enumerate(rows(study_id="s0"))]
    refused(write(tmp_path, table), "row 3", "'patient_id'", "'s0'", "row 2")


def test_doubled_image_ids(tmp_path: Path) -> None:
    table = [dict(row, image_id="same") for row in rows()]
    message = refused(write(tmp_path, table), "2 problems", "row 3", "row 4", "'image_id'")
    assert "add a column" not in message


def test_several_images_of_a_study(tmp_path: Path) -> None:
    table = [dict(row, study_id="s", patient_id="p", split="train", image_id=f"i{i}") for i, row in enumerate(rows())]
    assert list(read_manifest(write(tmp_path, table)).study_codes()) == [0, 0, 0]


@pytest.mark.parametrize("blank", ["findings", "impression"])
def test_half_a_report_is_normal(tmp_path: Path, blank: str) -> None:
    manifest = read_manifest(write(tmp_path, rows(**{blank: ""})))
    assert manifest.report(1) in ("Finding 1.", "Impression 1.")


def test_missing_columns(tmp_path: Path) -> None:
    table = [{k: v for k, v in row.items() if k not in ("split", "findings")} for row in rows()]
    refused(write(tmp_path, table), "missing columns split, findings", "found 'study_id")


def test_ten_problems_and_their_number(tmp_path: Path) -> None:
    table = [dict(rows()[0], study_id=f"s{i}", patient_id=f"p{i}", split="dev") for i in range(25)]
    message = refused(write(tmp_path, table), "25 problems", "row 2", "row 11")
    assert message.count("\n") == 10


def test_row_numbers_are_lines_of_an_editor(tmp_path: Path) -> None:
    table = rows(split="dev")
    table[0]["findings"] = "One\r\ntwo\nthree"
    path = write(tmp_path, table)
    lines = path.read_bytes().splitlines()
    at = next(i for i, line in enumerate(lines, start=1) if line.startswith(b"s1,"))
    assert at == 5
    refused(path, f"row {at},")


def test_links_that_leave_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("L", (4, 4)).save(outside / "1.png")
    for link, target in (("x/link.png", outside / "1.png"), ("linked", outside)):
        path = write(tmp_path / "data", rows(image_path=link if link.endswith("png") else "linked/1.png"))
        (tmp_path / "data" / link).symlink_to(target)
        refused(path, "row 3", "outside")
        read_manifest(path, check_images=False)
    # A link that stays inside is fine, and so is a data folder that is itself a link.
    path = write(tmp_path / "data", rows(image_path="x/inside.png"))
    (tmp_path / "data/x/inside.png").symlink_to("1.png")
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    assert len(read_manifest(tmp_path / "alias" / path.name)) == 3


def test_images_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    (tmp_path / "x/1.png").write_bytes(b"")
    refused(path, "row 3", "empty file")
    (tmp_path / "x/1.png").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    refused(path, "row 3", "is not a .png file")
    (tmp_path / "x/1.png").unlink()
    (tmp_path / "x/1.png").mkdir()
    refused(path, "row 3", "without files")
    read_manifest(path, check_images=False)


def test_an_image_without_permission(unprivileged: tuple[Path, Callable[[], AbstractContextManager[None]]]) -> None:
    folder, acting = unprivileged
    path = write(folder, rows())
    (folder / "x/1.png").chmod(0)
    with acting():
        refused(path, "row 3", "which is not readable")


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    refused(tmp_path / "none.csv", "no such file")
    refused(tmp_path, "folder")
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    refused(tmp_path / "a.xlsx", ".csv or .parquet")
    path = tmp_path / "a.csv"
    path.write_text("")
    refused(path, "empty")
    path.write_text("study_id,patient_id,split,image_path,findings,impression\n")
    refused(path, "no rows")
    path.write_text("study_id;patient_id;split;image_path;findings;impression\n")
    refused(path, "commas")
    path.write_text("study_id,patient_id,split,image_path,findings,impression,findings\n")
    refused(path, "more than once")
    head = "study_id,patient_id,split,image_path,findings,impression\n"
    path.write_bytes(head.encode() + "s,p,train,x,Aufnahme,über\n".encode("latin-1"))
    refused(path, "row 2", "UTF-8")
    path.write_text(head + "s,p,train,x,Heart, large,normal\n")
    refused(path, "row 2", "7 values", "quote")
    path.write_text(head + 's,p,train,x,"Heart,normal\n')
    refused(path, "row 2", "quotation mark")


def test_a_spreadsheets_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(read_manifest(path).frame["study_id"]) == ["s0", "s1", "s2"]


def xrays(tmp_path: Path, *changes: Row) -> Path:
    table = [
        dict(rows()[0], study_id=f"x{i}", patient_id=f"q{i}", image_path="x/0.png", **change)
        for i, change in enumerate({"view": "", "language": "", **change} for change in changes)
    ]
    return write(tmp_path / "data", table, name="xray.csv")


def test_whom_the_index_leaves_out(tmp_path: Path) -> None:
    ct = read_manifest(write(tmp_path / "data", rows()))
    base = {key: rows()[0][key] for key in ("study_id", "patient_id", "split", "image_path", "findings", "impression")}
    table = [
        {"patient_id": "q0", "view": "PA", "language": "en"},
        {"patient_id": "q1", "view": "ap", "language": ""},
        {"patient_id": "q2", "view": "", "language": "EN"},
        {"patient_id": "q3", "view": "Frontal", "language": "es"},
        {"patient_id": "q4", "view": "lateral", "language": "es"},
        {"patient_id": "q5", "view": "PA", "language": "en", "split": "val"},
        {"patient_id": "p1", "view": "PA", "language": "en"},  # CT val
        {"patient_id": "p2", "view": "lateral", "language": "es"},  # CT test, and lateral: counted once
        {"patient_id": "p0", "view": "PA", "language": "en"},  # CT train: stays
    ]
    table = [{**base, **row, "study_id": f"x{i}", "image_path": "x/0.png"} for i, row in enumerate(table)]
    xray = read_manifest(write(tmp_path / "data", table, name="xray.csv"))
    kept, counts = leave_out_for_index(xray, ct)
    assert list(kept.frame.index) == [0, 1, 2, 8]
    assert counts == {
        "not in split train": 1, "patient is in CT val or test": 2, "not a frontal view": 1, "language is not en": 1,
    }  # fmt: skip
    assert sum(counts.values()) + len(kept) == len(xray)
    spanish, _ = leave_out_for_index(xray, ct, language="es")
    assert list(spanish.frame.index) == [1, 3]  # a blank language counts as the one asked for
    every_view, _ = leave_out_for_index(xray, ct, frontal_only=False, language="es")
    assert list(every_view.frame.index) == [1, 3, 4]


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    ct = read_manifest(write(tmp_path / "data", rows()))
    xray = read_manifest(xrays(tmp_path, {"view": "lateral"}, {"view": "L"}))
    with pytest.raises(InputError, match="not a frontal view: 2"):
        leave_out_for_index(xray, ct)
