"""One rule of the extractor a line: sentences of our own, read by the shipped vocabularies."""

from __future__ import annotations

import pytest

from ctx_distill.text.extractor import extract, extract_sides, load_vocabulary
from ctx_distill.text.report_text import join_sections
from ctx_distill.text.sections import cut_report

EFFUSION, NODULE, OPACITY, AORTA = "Pleural effusion", "Lung nodule", "Lung opacity", "Arterial wall calcification"
CORONARY, PERICARDIUM, BRONCHI = (
    "Coronary artery wall calcification",
    "Pericardial effusion",
    "Peribronchial thickening",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # places
        ("Calcific plaques in the coronary arteries.", {CORONARY: 1}),
        ("Calcific plaques are seen in the aortic arch, the coronary arteries and the descending aorta.", {CORONARY: 1, AORTA: 1}),
        ("The thoracic aorta is dilated, calcific plaques are seen in the LAD.", {CORONARY: 1}),
        ("Calcified plaques of the abdominal aorta.", {}),
        ("Calcification of the aortic valve.", {}),
        ("A hypodense nodule in the thyroid gland.", {}),
        ("A nodule in the liver.", {}),
        ("Cyst of the liver, nodules in both lungs.", {NODULE: 1}),
        ("A small effusion in the pericardial space.", {PERICARDIUM: 1}),
        ("A small effusion around the spleen.", {}),
        ("An effusion in the left hemithorax.", {EFFUSION: 1}),
        ("Sequelae changes in the right kidney.", {}),
        ("A stent in the common bile duct.", {}),
        ("A stent is seen.", {"Medical material": 1}),
        # denied without being asserted
        ("No infiltrative lesion was detected.", {OPACITY: 0}),
        ("An infiltrative lesion was detected.", {}),
        # doubt, denied doubt
        ("No finding suggestive of pleural effusion.", {EFFUSION: 0}),
        ("The appearance may be due to atelectasis.", {"Atelectasis": -1}),
        ("Pleural effusion could not be evaluated.", {EFFUSION: -1}),
        # change
        ("No change in the pleural effusion.", {EFFUSION: 1}),
        ("No increase in peribronchial wall thickness.", {BRONCHI: 0}),
        ("A nodule, which was seen in the previous examination, was not detected today.", {NODULE: 0}),
        ("The nodule observed in the left lung has disappeared.", {NODULE: 0}),
        ("The nodule in the left lung was resected.", {NODULE: 0}),
        # lists, double negation, measurements
        ("No pleural effusion, nodule or cardiomegaly.", {EFFUSION: 0, NODULE: 0, "Cardiomegaly": 0}),
        ("Pleural effusion is not excluded.", {EFFUSION: -1}),
        ("A nodule of 3.5 mm in the upper lobe.", {NODULE: 1}),
        ("No nodule larger than 5.5 mm.", {NODULE: 0}),
    ],
)  # fmt: skip
def test_rules(text: str, expected: dict[str, int]) -> None:
    assert extract(text, load_vocabulary("ct-rate")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Left pleural effusion and right lung nodule.", {EFFUSION: "left", NODULE: "right"}),
        ("Effusion on the right and atelectasis on the left.", {EFFUSION: "right", "Atelectasis": "left"}),
        ("In the left lung, nodules and atelectasis are seen.", {NODULE: "left", "Atelectasis": "left"}),
        ("Bilateral pleural effusion.", {EFFUSION: "both"}),
        ("Right pleural effusion. Left pleural effusion.", {EFFUSION: "both"}),
        ("No left pleural effusion.", {}),
        ("Pericardial effusion beside the left ventricle.", {}),
        ("A nodule.", {}),
    ],
)
def test_sides(text: str, expected: dict[str, str]) -> None:
    assert extract_sides(text, load_vocabulary("ct-rate")) == expected


def test_history_is_no_finding() -> None:
    report = (
        "CLINICAL HISTORY: Pleural effusion.\n\nFINDINGS: A nodule in the left lung.\n\nIMPRESSION: No atelectasis."
    )
    text = join_sections(*cut_report(report))
    assert extract(text, load_vocabulary("ct-rate")) == {"Atelectasis": 0, NODULE: 1}
