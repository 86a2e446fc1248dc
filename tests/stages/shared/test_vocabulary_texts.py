"""Words of few patients stay out of a vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.stages.shared.vocabulary_texts import common_words, vocabulary_texts
from ctx_distill.text.tokenizer import train_wordpiece


def manifest(folder: Path) -> Manifest:
    """Six patients with common words; Smith stands in four reports of one patient and one of another."""
    rows = ["study_id,patient_id,split,image_path,findings,impression"]
    rows += [f"s{n},p{n},train,x.png,The lungs are clear. Seen on film {1000 + n}.," for n in range(6)]
    rows += [f"t{n},p0,train,x.png,Seen by Dr Smith.," for n in range(4)]
    rows += ["u,p1,train,x.png,Smith saw the lungs.,"]
    (folder / "ct.csv").write_text("\n".join(rows) + "\n")
    return read_manifest(folder / "ct.csv", check_images=False)


def test_words_of_fewer_than_five_patients_are_dropped(tmp_path: Path) -> None:
    texts = vocabulary_texts(manifest(tmp_path))
    assert texts[0] == "The lungs are clear. Seen on film ."
    assert texts[6:] == ["Seen ."] * 4 + ["the lungs."]
    tokenizer = train_wordpiece(texts, 400, tmp_path / "t", 32)
    words = set(tokenizer.get_vocab())
    assert {"lungs", "clear"} <= words
    assert not words & {"smith", "1000", "dr", "saw"}


def test_five_patients_are_enough_and_texts_without_an_id_count_once_each() -> None:
    texts = ["alpha beta", "Alpha", "ALPHA", "alpha.", "alpha gamma"]
    assert common_words(texts, ["a", "b", "c", "d", "e"], 5)[0] == "alpha"
    assert common_words(texts, ["a", "b", "c", "d", "d"], 5) == [""] * 5
    assert vocabulary_texts(more=["x y"]) == ["x y"]


def test_the_phantom_is_nobody(tmp_path: Path, cohort: Path) -> None:
    rows = read_manifest(cohort / "ct.csv").split("train")
    assert vocabulary_texts(rows) == [rows.report(row) for row in rows.frame.index]
    (tmp_path / "cohort.json").write_text("{}")
    assert "Smith" in " ".join(vocabulary_texts(manifest(tmp_path)))


@pytest.mark.parametrize("mixed", [True, False])
def test_real_texts_beside_the_phantom_are_filtered(tmp_path: Path, cohort: Path, mixed: bool) -> None:
    real = manifest(tmp_path)
    phantom = read_manifest(cohort / "ct.csv").split("train")
    assert "Smith" not in " ".join(vocabulary_texts(real, phantom) if mixed else vocabulary_texts(real, more=["Smith"]))
