"""Reports cut into sections, and marks of de-identification taken out, on texts in the forms of the public sets."""

from __future__ import annotations

import pytest

from ctx_distill.text.sections import cut_report, without_marks

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough  // pneumonia?

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  ___

 FINDINGS:

 The lungs are clear. Since ___, the effusion has
 resolved.
 HEART: normal in size.

 IMPRESSION:

 No acute process.
"""


def test_headings_in_capitals_part_a_report() -> None:
    findings, impression = cut_report(MIMIC)
    assert " ".join(findings.split()) == "The lungs are clear. Since, the effusion has resolved. HEART: normal in size."
    assert impression == "No acute process."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FINDINGS: Clear lungs. IMPRESSION: Normal.", ("Clear lungs.", "Normal.")),
        ("The lungs are clear.", ("The lungs are clear.", "")),
        ("INDICATION: cough.\n\nThe lungs are clear.\n\nIMPRESSION: Normal.", ("The lungs are clear.", "Normal.")),
        ("FINDINGS AND IMPRESSION: Small effusion.", ("Small effusion.", "")),
        ("HISTORY: Fever at 10:30.\nCONCLUSION: Pneumonia.", ("", "Pneumonia.")),
        ("INDICATION: cough.", ("", "")),
        ("", ("", "")),
        # other letters
        ("findings:\nClear lungs.\n\nimpression:\nNormal.", ("Clear lungs.", "Normal.")),
        ("Findings: Clear lungs. Impression: Normal.", ("Clear lungs.", "Normal.")),
        ("Clinical history: pneumonia.\nFindings: Clear lungs.\nConclusion: Normal.", ("Clear lungs.", "Normal.")),
        ("Indication: effusion?\n\nThe lungs are clear.\n\nImpression: Normal.", ("The lungs are clear.", "Normal.")),
        ("TECHNIQUE: PA.\nFindings:\nSmall effusion.", ("Small effusion.", "")),
        ("Findings and impression: Small effusion.", ("Small effusion.", "")),
        # no headings
        ("Comparison: CT of last year. A nodule is seen.", ("Comparison: CT of last year. A nodule is seen.", "")),
        ("There were two findings: a nodule and a cyst.", ("There were two findings: a nodule and a cyst.", "")),
        ("The lungs are clear. Findings: none.", ("The lungs are clear. Findings: none.", "")),
        ("Clear lungs.\nFindings: none.", ("Clear lungs.\nFindings: none.", "")),
        (
            "The nodule has these\nfindings: spicules and a tail.",
            ("The nodule has these\nfindings: spicules and a tail.", ""),
        ),
        ("The lungs are clear. Impression: stable.", ("The lungs are clear. Impression: stable.", "")),
        ("No change in history: 5 mm nodule.", ("No change in history: 5 mm nodule.", "")),
        ("Findings: Clear. No other findings: the end.", ("Clear. No other findings: the end.", "")),
    ],
)
def test_other_shapes(text: str, expected: tuple[str, str]) -> None:
    assert cut_report(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Not given.", ""),
        (" not given ", ""),
        ("nan", ""),
        ("Normal chest x-XXXX.", "Normal chest x-ray."),
        ("Inferior XXXX XXXX. Clear lungs.", "Inferior. Clear lungs."),
        ("XXXX. Clear lungs.", "Clear lungs."),
        ("Compared to ___ (___), no change.", "Compared to, no change."),
        ("Seen by [**Doctor Last Name 12**] at XXXXPM.", "Seen by at."),
        ("The extra XX vial measures 8.5 mm.", "The extra XX vial measures 8.5 mm."),
        ("A box of 3 x 4 x 5 mm.", "A box of 3 x 4 x 5 mm."),
    ],
)
def test_marks_go_and_words_stay(text: str, expected: str) -> None:
    assert without_marks(text) == expected
