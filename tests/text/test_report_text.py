"""Sentences, sections, random subsets, chunks, prompts."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from ctx_distill.text.prompts import prompt_pairs
from ctx_distill.text.report_text import join_sections, pack_chunks, sample_sentences, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("   \n ", []),
        ("Lungs are clear", ["Lungs are clear"]),
        ("A nodule of 5 mm. No effusion.", ["A nodule of 5 mm.", "No effusion."]),
        ("A nodule of 5 mm. in diameter is seen.", ["A nodule of 5 mm. in diameter is seen."]),
        ("Nodule of 1.5 cm, was 1.2 cm. Stable.", ["Nodule of 1.5 cm, was 1.2 cm.", "Stable."]),
        ("Seen by Dr. Miller on image no. 12. Clear.", ["Seen by Dr. Miller on image no. 12.", "Clear."]),
        ("Pneumonia vs. atelectasis, approx. 3 cm.", ["Pneumonia vs. atelectasis, approx. 3 cm."]),
        ("1. Pleural effusion. 2. Atelectasis.", ["Pleural effusion.", "Atelectasis."]),
        ("1) Pleural effusion\n2) Atelectasis", ["Pleural effusion", "Atelectasis"]),
        ("- Pleural effusion\n- atelectasis", ["Pleural effusion", "atelectasis"]),
        ("no effusion. heart normal.", ["no effusion.", "heart normal."]),
        ("Heart normal.\nNo effusion.", ["Heart normal.", "No effusion."]),
        ("FINDINGS\n\nNo effusion.", ["FINDINGS", "No effusion."]),
        ("Dense area (mediastinitis?). Follow up.", ["Dense area (mediastinitis?).", "Follow up."]),
        ("Dense area (mediastinitis?) is seen.", ["Dense area (mediastinitis?) is seen."]),
        # CT-RATE: stray quotes and bullets between the items of an impression
        ('Normal. "" Nodule in the lung." Effusion.', ["Normal.", "Nodule in the lung.", "Effusion."]),
        ("No mass. • Sequelae. • Cyst.", ["No mass.", "Sequelae.", "Cyst."]),
        ('A so-called "tree-in-bud" pattern is seen.', ['A so-called "tree-in-bud" pattern is seen.']),
    ],
)
def test_split_sentences(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


def test_a_line_wrapped_by_a_machine_is_one_sentence() -> None:
    text = (
        "There is a small pleural effusion on the right, with adjacent\n"
        "atelectasis of the lower lobe that is unchanged since the examination of\n"
        "March. No pneumothorax."
    )
    sentences = split_sentences(text)
    assert len(sentences) == 2
    assert sentences[0].endswith("examination of March.")
    assert sentences[1] == "No pneumothorax."


def test_join_sections() -> None:
    assert join_sections("Small effusion", "Effusion.") == "Small effusion. Effusion."
    assert join_sections("Not given.", "Effusion.") == "Effusion."
    assert join_sections(float("nan"), None) == ""
    assert join_sections("Clear lungs.", "Clear lungs") == "Clear lungs."
    joined = join_sections("Effusion.", "- nodule\n- no mass")
    assert split_sentences(joined) == ["Effusion.", "nodule.", "no mass."]


@pytest.mark.parametrize("make", [random.Random, np.random.default_rng])
def test_sample_sentences_keeps_order_and_reaches_one_and_all(make: type[random.Random]) -> None:
    sentences = [f"Sentence {word}." for word in ["alpha", "beta", "gamma", "delta", "epsilon"]]
    text = " ".join(sentences)
    rng = make(7)
    sizes: Counter[int] = Counter()
    used: Counter[str] = Counter()
    for _ in range(2000):
        drawn = split_sentences(sample_sentences(text, rng))
        assert drawn == [sentence for sentence in sentences if sentence in drawn]
        sizes[len(drawn)] += 1
        used.update(drawn)
    # documented: 3/8 + 3/8/5 single, 1/4 + 3/8/5 whole, 3/8/5 each between; 4 standard errors are about .045
    expected = {1: 0.45, 2: 0.075, 3: 0.075, 4: 0.075, 5: 0.325}
    for size, share in expected.items():
        assert sizes[size] / 2000 == pytest.approx(share, abs=0.045)
    assert max(used.values()) / min(used.values()) < 1.2


def test_sample_sentences_minimum() -> None:
    rng = random.Random(0)
    sizes = {len(split_sentences(sample_sentences("One is. Two is. Three is. Four is.", rng, 3))) for _ in range(200)}
    assert sizes == {3, 4}
    assert sample_sentences("Only one.", rng, 3) == "Only one."
    with pytest.raises(ValueError, match="minimum"):
        sample_sentences("One.", rng, 0)


def test_pack_chunks_packs_breaks_and_loses_nothing() -> None:
    def fits(text: str) -> bool:
        return len(text.split()) <= 4

    sentences = ["a b", "c d", "e", "f g h i j k l m n", "o p"]
    chunks = pack_chunks(sentences, fits)
    assert chunks == ["a b c d", "e", "f g h i", "j k l m", "n o p"]
    assert pack_chunks([], fits) == []
    assert pack_chunks(["long words"], lambda text: len(text) < 3) == ["long", "words"]


def test_prompt_pairs() -> None:
    assert prompt_pairs("pleural effusion") == (["Pleural effusion is present."], ["Pleural effusion is not present."])
    assert prompt_pairs("Pleural_Effusion") == prompt_pairs("pleural effusion")
    assert prompt_pairs("COPD")[0] == ["COPD is present."]
    positives, negatives = prompt_pairs("lung nodules", templates="ensemble", style="ct")
    assert len(positives) == len(negatives) == len(set(positives)) == len(set(negatives)) > 4
    assert not set(positives) & set(negatives)
    assert "There is lung nodules." in positives
    assert "Chest CT shows no lung nodules." in negatives
    with pytest.raises(ValueError, match="empty"):
        prompt_pairs(" ")
    with pytest.raises(ValueError, match="templates"):
        prompt_pairs("nodule", templates="other")  # type: ignore[arg-type]
