"""CheXpert's "No Finding": what is left where nothing else is asserted or in doubt; support devices are no finding."""

from __future__ import annotations

import pytest

from ctx_distill.text.extractor import extract, load_vocabulary, vocabulary_for


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("Heart size is normal. The lungs are clear.", True),
        ("No acute cardiopulmonary abnormality.", True),
        ("Left chest tube in place. No pneumothorax.", True),
        ("No acute cardiopulmonary abnormality. Calcified granuloma in the left lung.", False),
        ("No acute process. Mild degenerative change of the spine.", False),
        ("The lungs are clear. Possible small effusion.", False),
        ("No effusion. Cardiomegaly.", False),
        ("No effusion, no emphysema.", True),
        ("", False),
        ("Kalp boyutu normaldir, plevral efuzyon saptanmadi.", False),
    ],
)
def test_it_is_what_is_left(text: str, there: bool) -> None:
    assert extract(text, load_vocabulary("chexpert")).get("No Finding") == (1 if there else None)
    if there or not text.startswith("The lungs are clear. P"):
        assert extract(text, vocabulary_for(["No Finding"])).get("No Finding") == (1 if there else None)


def test_a_granuloma_is_no_lung_lesion_and_a_nodule_is() -> None:
    vocabulary = load_vocabulary("chexpert")
    assert "Lung Lesion" not in extract("Calcified granuloma in the left lung.", vocabulary)
    assert extract("Calcified nodule in the left lung.", vocabulary)["Lung Lesion"] == 1
