"""Names, dates and numbers in reports: found where they are, and not where they are not."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from ctx_distill.data.quality.text import check_text, identical_texts

REPORTS = Path(__file__).parents[4] / "shared/data/reports"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Compared to the study dated 07.02.2022.", "text_date"),
        ("As of 2021-03-04 unchanged.", "text_date"),
        ("On March 3, 2019 the patient", "text_date"),
        ("dated 1 June 2020", "text_date"),
        ("12/25/19 film", "text_date"),
        ("Discussed with Dr. Smith.", "text_name"),
        ("Discussed with Dr Smith at noon.", "text_name"),
        ("Assist.Prof.Dr.Jane ÇELIK, radiology", "text_name"),
        ("Dictated by: John Doe", "text_name"),
        ("MRN: 00123", "text_number"),
        ("Accession number AB-123456", "text_number"),
        ("Call +1 555-123-4567", "text_number"),
        ("write to jane.doe@hospital.org", "text_number"),
        ("file 12345678", "text_number"),
    ],
)
def test_what_names_a_person(text: str, code: str) -> None:
    assert code in {fault.code for fault in check_text(text)}


@pytest.mark.parametrize(
    "text",
    [
        "A nodule of 12.5 x 8.3 mm in segment 6, previously 11.2 x 8.0 mm.",
        "Cardiothoracic ratio of 16.2/24.7.",
        "T1-2-3 vertebrae; images 3/45 and 4/112.",
        "Density of 30-40 HU, BI-RADS 2, stage T2a.",
        "There may be 3 nodules. In March the findings were the same.",
        "Drain in place. Drug-induced changes. Missing ribs.",
        "Ratio 1.0.2 and 10/20/30 mm",
    ],
)
def test_measurements_are_no_persons(text: str) -> None:
    assert not check_text(text)


def test_no_text_is_a_note() -> None:
    assert [(fault.severity, fault.code) for fault in check_text("")] == [("note", "no_text")]


def test_a_long_report_of_two_patients() -> None:
    long, short = "The lungs are clear. " * 12, "Normal."
    items = [
        ("a", "p1", long),
        ("b", "p2", long),
        ("c", "p3", short),
        ("d", "p4", short),
        ("e", "p5", long + "x"),
        ("f", "p5", long + "x"),
    ]
    assert set(identical_texts(items)) == {"a", "b"}


@pytest.mark.skipif(not REPORTS.is_dir(), reason="the real reports are not here")
def test_false_alarms_on_real_reports() -> None:
    """The de-identified Open-I reports hold no person; of the CT reports, dates of earlier studies are left in, and one signature."""
    from ctx_distill.sources.open_i import read_reports

    films = [f"{r.findings} {r.impression}".strip() for r in read_reports(REPORTS / "openi_NLMCXR_reports.tgz")]
    told = [fault.code for text in films for fault in check_text(text) if fault.severity == "warning"]
    assert told == []
    with (REPORTS / "ct_reports_18_labels.csv").open() as file:
        scans = [row["report_text"] for row in csv.DictReader(file)]
    told = [fault.code for text in scans for fault in check_text(text) if fault.severity == "warning"]
    # written out another way than the rule is: every report with a day, a month and a year; one report is signed by name
    months = "January|February|March|April|May|June|July|August|September|October|November|December"
    dated = [
        text
        for text in scans
        if re.search(
            rf"\d{{1,2}}[./-]\d{{1,2}}[./-](?:19|20)\d\d|\d{{1,2}} (?:{months}) 20\d\d|(?:{months}) \d{{1,2}}, 20\d\d",
            text,
        )
    ]
    assert sorted(told) == ["text_date"] * len(dated) + ["text_name"]
    assert sum("Specialist" in text for text in scans if "text_name" in {fault.code for fault in check_text(text)}) == 1
