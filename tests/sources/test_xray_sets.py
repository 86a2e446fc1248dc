"""MIMIC-CXR-JPG, CheXpert Plus, PadChest and Open-I in miniature: ids, splits, views, polarity, texts."""

from __future__ import annotations

import csv
import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ctx_distill.commands.main import main
from ctx_distill.data.io.radiograph import read_radiograph
from ctx_distill.data.manifests.index_rows import leave_out_for_index
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.sources.padchest import english_from_labels

REAL_ARCHIVE = Path(__file__).parents[3] / "shared/data/reports/openi_NLMCXR_reports.tgz"


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def film(path: Path, deep: bool = False) -> None:
    """A bright block on dark; 16 bits where `deep`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((24, 20), 3000 if deep else 20, dtype=np.uint16 if deep else np.uint8)
    pixels[6:18, 5:15] = 12000 if deep else 220
    Image.fromarray(pixels).save(path)


def built(source: str, root: Path, *options: str) -> Manifest:
    assert main(["manifest", source, str(root), str(root / "xray.csv"), *options]) == 0
    return read_manifest(root / "xray.csv")


def mimic(root: Path) -> Path:
    """Two patients; the first has a frontal and a lateral film of one study, the second sits in two splits."""
    films = [("a1", "10000032", "50414267", "PA", "train"), ("a2", "10000032", "50414267", "LATERAL", "train"),
             ("b1", "10000764", "57375967", "AP", "train"), ("b2", "10000764", "57375968", "", "validate"),
             ("gone", "10000764", "57375968", "PA", "validate")]  # fmt: skip

    def gz(name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        (root / f"mimic-cxr-2.0.0-{name}.csv.gz").write_bytes(gzip.compress(csv_text(header, rows).encode()))

    gz("metadata", ["dicom_id", "subject_id", "study_id", "ViewPosition"], [f[:4] for f in films])
    gz("split", ["dicom_id", "study_id", "subject_id", "split"], [(f[0], f[2], f[1], f[4]) for f in films])
    gz("chexpert", ["subject_id", "study_id", "Atelectasis", "Edema"], [("10000032", "50414267", "1.0", "-1.0")])
    for dicom, patient, study, *_ in films[:4]:
        film(root / f"files/p10/p{patient}/s{study}/{dicom}.jpg")
    (root / "files/p10/p10000032/s50414267.txt").write_text(
        "FINAL REPORT\n FINDINGS:\n Effusion since ___.\n IMPRESSION: Effusion.\n"
    )
    return root


def test_mimic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = built("mimic-cxr", mimic(tmp_path))
    frame = manifest.frame.set_index("image_id")
    assert frame["view"].to_dict() == {"a1": "PA", "a2": "lateral", "b1": "AP", "b2": "other"}
    assert frame["split"].to_dict() == {"a1": "train", "a2": "train", "b1": "val", "b2": "val"}
    assert frame.loc["a1", ["study_id", "patient_id", "findings", "impression"]].tolist() == [
        "s50414267", "p10000032", "Effusion since.", "Effusion.",
    ]  # fmt: skip
    assert frame.loc["a2", "label:edema"] == -1
    assert np.isnan(frame.loc["b1", "label:atelectasis"])
    told = capsys.readouterr().out
    assert "excluded, image file does not exist: 1" in told
    assert "1 patients were in several splits; 1 of their images" in told
    kept, _ = leave_out_for_index(manifest, manifest.split("test"))
    assert kept.frame["image_id"].tolist() == ["a1"]


def test_mimic_with_a_damaged_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mimic(tmp_path)
    table = tmp_path / "mimic-cxr-2.0.0-split.csv.gz"
    table.write_bytes(table.read_bytes()[:-9])
    assert main(["manifest", "mimic-cxr", str(tmp_path), str(tmp_path / "x.csv")]) == 2
    assert "split.csv.gz: cannot read the file" in capsys.readouterr().err
    table.unlink()
    assert main(["manifest", "mimic-cxr", str(tmp_path), str(tmp_path / "x.csv")]) == 2
    assert "no mimic-cxr-2.0.0-split.csv.gz" in capsys.readouterr().err


def test_chexpert_plus(tmp_path: Path) -> None:
    header = ["path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order",
              "report", "section_findings", "section_impression", "split"]  # fmt: skip
    report = "NARRATIVE: x\n\nFINDINGS: Small effusion.\n\nIMPRESSION: 1. Effusion."
    rows = [
        ["train/patient00001/study1/view1_frontal.jpg", "", "Frontal", "AP", "patient00001", 1, report, "", "1. Effusion.", "train"],
        ["train/patient00001/study1/view2_lateral.jpg", "", "Lateral", "", "patient00001", 1, report, "", "", "train"],
        ["valid/patient64541/study1/view1_frontal.jpg", "", "Frontal", "", "patient64541", 1, report, "Own words.", "", "valid"],
        ["train/patient00002/study1/view1_frontal.jpg", "", "Frontal", "PA", "patient00002", 1, report, "", "", "train"],
    ]  # fmt: skip
    (tmp_path / "df_chexpert_plus_240401.csv").write_text(csv_text(header, rows))
    film(tmp_path / "train/patient00001/study1/view1_frontal.jpg")
    film(tmp_path / "PNG/train/patient00001/study1/view2_lateral.png")
    film(tmp_path / "valid/patient64541/study1/view1_frontal.jpg")
    frame = built("chexpert-plus", tmp_path).frame
    assert frame["view"].tolist() == ["AP", "lateral", "frontal"]
    assert frame["study_id"].tolist() == ["patient00001_study1"] * 2 + ["patient64541_study1"]
    assert frame["findings"].tolist() == ["Small effusion.", "Small effusion.", "Own words."]
    assert set(frame["impression"]) == {"1. Effusion."}
    assert frame["split"].iloc[2] == "test"
    assert frame["split"].iloc[0] in ("train", "val")
    assert frame["image_path"].iloc[1].startswith("PNG/")


def padchest(root: Path) -> Path:
    header = ["ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "Projection", "Labels", "Report",
              "PhotometricInterpretation_DICOM"]  # fmt: skip
    rows = [
        [
            "1.png",
            "0",
            "20140915",
            "s1",
            "p1",
            "PA",
            "['pleural effusion', 'cardiomegaly']",
            "derrame pleural.",
            "MONOCHROME2",
        ],
        ["2.png", "0", "20140915", "s1", "p1", "L", "['pleural effusion']", "derrame pleural.", "MONOCHROME2"],
        ["3.png", "1", "20150101", "s2", "p2", "AP_horizontal", "['normal']", "sin hallazgos.", "MONOCHROME1"],
        ["4.png", "1", "20150101", "s3", "p3", "PA", "['exclude']", "", "MONOCHROME2"],
        ["5.png", "1", "20150101", "s4", "p4", "COSTAL", "nan", "nada.", "MONOCHROME2"],
    ]
    (root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv").write_text(csv_text(header, rows))
    for name in ("0/1", "0/2", "1/3", "1/4", "1/5"):
        film(root / f"{name}.png", deep=True)
    inverted = 65535 - np.asarray(Image.open(root / "1/3.png")).astype(np.int64)
    Image.fromarray(inverted.astype(np.uint16)).save(root / "1/3.png")
    return root


def test_padchest_in_spanish_with_views_and_polarity(tmp_path: Path) -> None:
    manifest = built("padchest", padchest(tmp_path))
    frame = manifest.frame.set_index("image_id")
    assert frame["view"].to_dict() == {"1.png": "PA", "2.png": "lateral", "3.png": "AP", "5.png": "other"}
    assert set(frame["language"]) == {"es"}
    assert frame.loc["1.png", "findings"] == "derrame pleural."
    assert frame.loc["1.png", ["label:pleural effusion", "label:cardiomegaly", "label:edema"]].tolist() == [1, 1, 0]
    assert [manifest.inverted(row) for row in range(4)] == [False, False, True, False]
    bright = read_radiograph(tmp_path / "0/1.png")
    turned = read_radiograph(manifest.image_file(2), manifest.inverted(2))
    np.testing.assert_allclose(turned, bright, atol=1e-4)
    assert bright[12, 10] > 0.9 > 0.1 > bright[1, 1]


def test_padchest_in_english_made_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = built("padchest", padchest(tmp_path), "--english-from-labels").frame.set_index("image_id")
    assert frame.loc["1.png", "findings"] == "Pleural effusion. Cardiomegaly."
    assert frame.loc["3.png", "findings"] == "No acute cardiopulmonary finding."
    assert set(frame["language"]) == {"en"}
    assert "generated from the labels by ctx-distill, not reports" in capsys.readouterr().out
    assert english_from_labels(["unchanged"]) == ""


def test_padchest_without_study_ids_and_polarity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copies of the table go around with fewer columns: films of a patient and a day are a study then, and no date is told."""
    table = padchest(tmp_path) / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    frame = pd.read_csv(table, dtype=str, keep_default_na=False)
    frame.drop(columns=["StudyID", "PhotometricInterpretation_DICOM"]).to_csv(table, index=False)
    manifest = built("padchest", tmp_path)
    assert manifest.frame["study_id"].tolist() == ["p1_1", "p1_1", "p2_1", "p4_1"]
    assert not any(manifest.inverted(row) for row in range(4))
    assert "no column PhotometricInterpretation_DICOM" in capsys.readouterr().out
    frame.drop(columns=["StudyID", "StudyDate_DICOM"]).to_csv(table, index=False)
    assert main(["manifest", "padchest", str(tmp_path), str(tmp_path / "x.csv")]) == 2
    assert "neither column StudyID nor StudyDate_DICOM" in capsys.readouterr().err


def test_a_label_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mimic(tmp_path)
    rows = csv_text(["subject_id", "study_id", "Edema"], [("10000032", "50414267", "yes")])
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz").write_bytes(gzip.compress(rows.encode()))
    assert main(["manifest", "mimic-cxr", str(tmp_path), str(tmp_path / "x.csv")]) == 2
    assert "column 'Edema': found 'yes'; expected a number or blank" in capsys.readouterr().err


def open_i_xml(uid: str, findings: str, impression: str, images: Sequence[str]) -> str:
    films = "".join(f'<parentImage id="{name}"><caption>Xray</caption></parentImage>' for name in images)
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="{uid}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText></Abstract></Article></MedlineCitation>
<MeSH><major>Cardiomegaly/mild</major><automatic>cardiomegaly</automatic></MeSH>{films}</eCitation>"""


def open_i(root: Path, *documents: str) -> Path:
    with tarfile.open(root / "NLMCXR_reports.tgz", "w:gz") as archive:
        for number, text in enumerate(documents):
            member = tarfile.TarInfo(f"ecgen-radiology/{number}.xml")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return root


def test_open_i(tmp_path: Path) -> None:
    first = open_i_xml(
        "CXR1", "Heart is XXXX enlarged.", "Normal chest x-XXXX.", ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]
    )
    open_i(tmp_path, first, open_i_xml("CXR2", "", "Clear.", []))
    for name in ("3001", "4001"):
        film(tmp_path / f"NLMCXR_png/CXR1_1_IM-0001-{name}.png")
    frame = built("open-i", tmp_path).frame
    assert frame["view"].tolist() == ["unknown", "unknown"]
    assert frame["findings"].tolist() == ["Heart is enlarged."] * 2
    assert frame["impression"].tolist() == ["Normal chest x-ray."] * 2
    assert frame["study_id"].tolist() == ["CXR1", "CXR1"]
    assert built("open-i", tmp_path, "--first-is-frontal").frame["view"].tolist() == ["frontal", "lateral"]
    table = csv_text(
        ["uid", "filename", "projection"],
        [[1, "1_IM-0001-4001.dcm.png", "Frontal"], [1, "1_IM-0001-3001.dcm.png", "Lateral"]],
    )
    (tmp_path / "indiana_projections.csv").write_text(table)
    assert dict(built("open-i", tmp_path).frame.set_index("image_id")["view"]) == {
        "CXR1_1_IM-0001-3001": "lateral", "CXR1_1_IM-0001-4001": "frontal",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("<eCitation>", "not well-formed"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><eCitation/>', "entities"),
        ("<eCitation/>", "no uId"),
    ],
)
def test_open_i_with_a_report_that_is_none(
    tmp_path: Path, text: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    open_i(tmp_path, text)
    assert main(["manifest", "open-i", str(tmp_path), str(tmp_path / "x.csv")]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.skipif(not REAL_ARCHIVE.is_file(), reason="the real Open-I archive is not here")
def test_the_real_open_i_archive(tmp_path: Path) -> None:
    """3,955 reports and 7,470 films are the published counts; every report's uid stands once."""
    from ctx_distill.sources.open_i import read_reports

    reports = list(read_reports(REAL_ARCHIVE))
    assert len(reports) == len({report.uid for report in reports}) == 3955
    assert sum(len(report.images) for report in reports) == 7470
    texts = [text for report in reports for text in (report.findings, report.impression)]
    assert not [text for text in texts if "XXX" in text]
    assert reports[0].impression == "Normal chest x-ray."
    (tmp_path / "NLMCXR_png").mkdir()
    some = [image for report in reports[:50] for image in report.images]
    for image in some:
        film(tmp_path / f"NLMCXR_png/{image}.png")
    (tmp_path / REAL_ARCHIVE.name).symlink_to(REAL_ARCHIVE)  # under the name it is kept by here
    assert len(built("open-i", tmp_path)) == len(some)
