"""The findings extractor: assertion, scope, vocabularies, bad input."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from ctx_distill.text.extractor import (
    Finding,
    Vocabulary,
    extract,
    extract_many,
    findings_set,
    load_vocabulary,
    shipped_vocabularies,
    vocabulary_for,
)
from ctx_distill.text.prompts import prompt_pairs
from ctx_distill.types import InputError

VOCABULARY = Vocabulary(
    "test",
    (
        Finding("effusion", ("pleural effusion", "effusion", "pleural fluid"), ("pleural spaces are clear",)),
        Finding("pneumothorax", ("pneumothorax",)),
        Finding("nodule", ("nodule", "opacity"), ("lungs are clear",), ("thyroid nodule",)),
        Finding("atelectasis", ("atelectasis",)),
        Finding("cardiomegaly", ("cardiomegaly", "heart is enlarged"), ("heart size ... normal",)),
    ),
)
E, P, N, A, C = VOCABULARY.names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # mentions
        ("Pleural effusion on the left.", {E: 1}),
        ("PLEURAL EFFUSIONS are seen.", {E: 1}),
        ("Bilateral opacities.", {N: 1}),
        ("Effusions-nodules.", {E: 1, N: 1}),
        ("Noduless and renodule are no words.", {}),
        ("The spine is straight.", {}),
        ("There is a thyroid nodule.", {}),
        # negation before
        ("No pleural effusion.", {E: 0}),
        ("No pleural effusion, pneumothorax or nodule is seen.", {E: 0, P: 0, N: 0}),
        ("No pleural effusion, pneumothorax, or nodules.", {E: 0, P: 0, N: 0}),
        ("No effusion or pneumothorax and no nodule.", {E: 0, P: 0, N: 0}),
        ("Negative for pneumothorax.", {P: 0}),
        ("Absence of effusion.", {E: 0}),
        ("The lungs are free of nodules.", {N: 0}),
        ("Examination without evidence of effusion.", {E: 0}),
        ("The examination does not show a nodule.", {N: 0}),
        ("The examination doesn't show a nodule.", {N: 0}),
        ("Neither effusion nor pneumothorax.", {E: 0, P: 0}),
        # negation behind
        ("Pleural effusion is not seen.", {E: 0}),
        ("Pleural effusion-thickening was not observed.", {E: 0}),
        ("Effusion, pneumothorax and nodules are not present.", {E: 0, P: 0, N: 0}),
        ("The pleural effusion has resolved.", {E: 0}),
        ("Pleural effusion: none.", {E: 0}),
        # the end of a scope
        ("No pneumothorax, but a pleural effusion.", {P: 0, E: 1}),
        ("No pneumothorax; pleural effusion on the left.", {P: 0, E: 1}),
        ("No nodule, however atelectasis is seen.", {N: 0, A: 1}),
        ("No abnormality except for a nodule.", {N: 1}),
        ("No pneumothorax, small left pleural effusion.", {P: 0, E: 1}),
        ("No pneumothorax, small effusion or nodule.", {P: 0, E: 0, N: 0}),
        ("No pneumothorax and there is a pleural effusion.", {P: 0, E: 1}),
        ("No pneumothorax, the heart is enlarged.", {P: 0, C: 1}),
        ("No nodule was detected, pleural effusion was observed.", {N: 0, E: 1}),
        ("Pleural effusion is seen, pneumothorax is not seen.", {E: 1, P: 0}),
        ("There is pleural effusion, pneumothorax is not seen.", {E: 1, P: 0}),
        ("Pleural effusion without pneumothorax.", {E: 1, P: 0}),
        ("The base is not seen due to effusion.", {E: 1}),
        ("No pneumothorax. Pleural effusion.", {P: 0, E: 1}),
        # looks like a negation
        ("No change in the pleural effusion.", {E: 1}),
        ("Not only effusion is seen.", {E: 1}),
        # uncertain
        ("Possible nodule.", {N: -1}),
        ("Atelectasis cannot be excluded.", {A: -1}),
        ("This may represent atelectasis.", {A: -1}),
        ("Opacity may represent atelectasis.", {N: 1, A: -1}),
        ("Small opacity (atelectasis?).", {N: 1, A: -1}),
        ("Atelectasis versus nodule.", {A: -1, N: -1}),
        ("No large effusion, small effusion cannot be excluded.", {E: -1}),
        ("Possible effusion without pneumothorax.", {E: -1, P: 0}),
        # nothing is said
        ("Evaluate for pneumothorax.", {}),
        ("History of effusion.", {}),
        # normal phrases
        ("The pleural spaces are clear.", {E: 0}),
        ("Heart size and contours are normal.", {C: 0}),
        ("Heart size and contours are not normal.", {}),
        ("The lungs are clear. A nodule is seen.", {N: 1}),
        # present outranks uncertain outranks absent, in any order
        ("No effusion. Effusion on the left.", {E: 1}),
        ("Effusion on the left. No effusion on the right.", {E: 1}),
        ("Possible effusion. No effusion.", {E: -1}),
        ("Possible effusion. Effusion.", {E: 1}),
    ],
)
def test_extract(text: str, expected: dict[str, int]) -> None:
    assert extract(text, VOCABULARY) == expected


def test_extract_many_and_set() -> None:
    texts = ["Effusion. No nodule. Possible atelectasis.", "", "Effusion. No nodule. Possible atelectasis."]
    values = extract_many(texts, VOCABULARY)
    row = [1, np.nan, 0, -1, np.nan]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array([row, [np.nan] * 5, row], dtype=np.float32))
    assert findings_set(texts[0], VOCABULARY) == frozenset({"effusion"})
    assert findings_set("No pleural effusion.") == frozenset()
    assert findings_set("Pleural effusion and a hiatal hernia.") == {"Pleural effusion", "Hiatal hernia"}


@pytest.mark.parametrize("name", shipped_vocabularies())
def test_shipped_vocabularies_understand_their_own_prompts(name: str) -> None:
    vocabulary = load_vocabulary(name)
    for finding in vocabulary.findings:
        if finding.name == "No Finding":  # a negation by nature: "No finding is not present" is nobody's sentence
            continue
        positives, negatives = prompt_pairs(finding.name, templates="ensemble", style="ct")
        assert [extract(text, vocabulary).get(finding.name) for text in positives] == [1] * len(positives), finding.name
        assert [extract(text, vocabulary).get(finding.name) for text in negatives] == [0] * len(negatives), finding.name
        for synonym in finding.synonyms:
            text = synonym.replace("...", "in the")
            assert extract(f"{text}.", vocabulary).get(finding.name) == 1, (finding.name, synonym)
        for normal in finding.normal:
            text = normal.replace("...", "is")
            assert extract(f"{text}.", vocabulary).get(finding.name) == 0, (finding.name, normal)


def test_shipped_vocabularies_have_the_published_labels() -> None:
    assert {"ct-rate", "chexpert"} <= set(shipped_vocabularies())
    assert "cues" not in shipped_vocabularies()
    names = load_vocabulary("CT_RATE").names
    assert (len(names), names[0], names[4], names[-1]) == (
        18,
        "Medical material",
        "Coronary artery wall calcification",
        "Interlobular septal thickening",
    )
    assert len(load_vocabulary("chexpert").names) == 14


def test_ct_rate_style_report() -> None:
    report = (
        "Trachea, both main bronchi are open. Mediastinal main vascular structures, heart contour, size are normal. "
        "Pericardial effusion-thickening was not observed. Calcific atheroma plaques are observed in the aorta. "
        "No lymph node was detected in the mediastinum. When examined in the lung parenchyma window; linear atelectasis "
        "is observed in the left lung. A 4 mm nodule is seen; no mass or infiltrative lesion was detected. "
        "Pleural effusion was not detected."
    )
    assert extract(report, load_vocabulary("ct-rate")) == {
        "Arterial wall calcification": 1,
        "Cardiomegaly": 0,
        "Pericardial effusion": 0,
        "Lymphadenopathy": 0,
        "Atelectasis": 1,
        "Lung nodule": 1,
        "Lung opacity": 0,
        "Pleural effusion": 0,
    }


def test_vocabulary_for_keeps_names_and_masks_what_was_not_asked_for() -> None:
    vocabulary = vocabulary_for(["HIATAL hernia", "pleural effusion", "whirl_sign"])
    assert vocabulary.names == ["HIATAL hernia", "pleural effusion", "whirl_sign"]
    found = extract("Pericardial effusion. Sliding type hernia. No whirl signs.", vocabulary)
    assert found == {"HIATAL hernia": 1, "whirl_sign": 0}
    assert extract("Effusion on the left.", vocabulary) == {"pleural effusion": 1}
    with pytest.raises(InputError, match="2 times"):
        vocabulary_for(["nodule", "Nodule"])


def test_a_part_of_a_vocabulary_reads_as_the_whole() -> None:
    whole = load_vocabulary("ct-rate")
    text = "Calcified plaques in the coronary arteries. Pericardial effusion. Subcutaneous emphysema. A thyroid nodule."
    everything = extract(text, whole)
    for name in whole.names:
        assert extract(text, vocabulary_for([name])) == {k: v for k, v in everything.items() if k == name}, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("findings: [", "line 1"),
        ("- a\n- b\n", "no mapping 'findings'"),
        ("name: x\nfindings: {}\n", "no mapping 'findings'"),
        ("findings:\n  nodule:\n    synonym: [a]\n", "unknown key 'synonym'"),
        ("findings:\n  nodule:\n    synonyms: a\n", "expected a list"),
        ("findings:\n  nodule:\n    synonyms: [1.5]\n", "1.5"),
        ("findings:\n  nodule:\n    normal: ['...']\n", "between words"),
        ("findings:\n  nodule:\n    visible_on_xray: 3\n", "true or false"),
        ("findings:\n  nodule:\n  Nodule:\n", "2 times"),
        ("findings:\n  nodule:\n    located: [a]\n", "expected 'terms'"),
        ("findings:\n  nodule:\n    located: [{terms: [a]}]\n", "no place; add"),
        ("findings:\n  nodule:\n    located: [{terms: [a], sites: [b], required: 3}]\n", "true or false"),
        ("findings:\n  no:\n    synonyms: [a]\n", "quote it"),
    ],
)
def test_bad_vocabulary_says_what_and_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_vocabulary(path)
    assert str(path) in str(caught.value)


def test_missing_vocabulary_says_what_there_is(tmp_path: Path) -> None:
    for name in ("nothing", "cues", "../vocabularies/ct-rate"):
        with pytest.raises(InputError, match="ct-rate"):
            load_vocabulary(name)
    with pytest.raises(InputError, match="cannot read the file"):
        load_vocabulary(tmp_path / "absent.yaml")


def test_own_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("findings:\n  nodule:\n  mass:\n    synonyms: [mass, tumour]\n    region: lung\n")
    vocabulary = load_vocabulary(path)
    assert vocabulary.name == "own"
    assert extract("A tumour, no nodules.", vocabulary) == {"nodule": 0, "mass": 1}
    assert vocabulary.findings[1].region == "lung"


def test_thousands_of_short_reports_a_second() -> None:
    vocabulary = load_vocabulary("ct-rate")
    reports = [
        f"A nodule of {i} mm in the left lung. No pleural effusion in level {i}. Heart size is normal."
        for i in range(3000)
    ]
    started = time.process_time()
    assert (extract_many(reports, vocabulary) == 1).sum() == 3000
    assert time.process_time() - started < 3  # measured .4 s; the bound is for a busy machine


@pytest.mark.parametrize("name", ["ct-rate", "chexpert", "phantom"])
def test_every_shipped_finding_says_whether_an_x_ray_shows_it(name: str) -> None:
    vocabulary = load_vocabulary(name)
    assert not [finding.name for finding in vocabulary.findings if finding.visible_on_xray is None]
    hidden = {finding.name for finding in vocabulary.findings if finding.visible_on_xray is False}
    assert {
        "ct-rate": hidden
        >= {"Coronary artery wall calcification", "Pericardial effusion", "Mosaic attenuation pattern"},
        "chexpert": not hidden,
        "phantom": hidden == {"pericardial effusion", "coronary calcification", "lymphadenopathy"},
    }[name]
    assert Vocabulary(
        "x", (Finding("a", ("a",)), Finding("b", ("b",), visible_on_xray=False))
    ).visible_on_xray.tolist() == [True, False]
