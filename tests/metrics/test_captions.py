"""CIDEr, BLEU and ROUGE-L as the COCO caption tools give them, from plain text to figures."""

from __future__ import annotations

import sys

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from ctx_distill.metrics import captions
from ctx_distill.metrics.captions import CAPTION_KEYS, caption_scores, caption_tokens

REFERENCES = [
    "Small left pleural effusion, 12 mm. No nodule or mass is seen!",
    "The heart is normal (not enlarged). There is a nodule in the right upper lobe.",
    "Post-operative changes; a mass of 2.5 cm in the left lower lobe.",
    "The lungs are clear. No effusion is seen.",
]
HYPOTHESES = [
    "Small right pleural effusion. No mass is seen.",
    "The heart is normal. There is a mass in the right upper lobe.",
    "",
    "The lungs are clear. A nodule in the left lower lobe is seen.",
]
# The same sentences as a person cuts them by the tools' rules: lower case, marks gone, brackets kept as -lrb-, numbers whole.
CUT = [
    "small left pleural effusion 12 mm no nodule or mass is seen",
    "the heart is normal -lrb- not enlarged -rrb- there is a nodule in the right upper lobe",
    "post-operative changes a mass of 2.5 cm in the left lower lobe",
    "the lungs are clear no effusion is seen",
]


def test_words_are_cut_by_the_tools_rules() -> None:
    assert [caption_tokens(text) for text in REFERENCES] == CUT
    assert caption_tokens("") == ""
    marks = {mark.lower() for mark in ptbtokenizer.PUNCTUATIONS if not mark.startswith("-") or mark in ("-", "--")}
    assert marks == captions.PUNCTUATION


def test_scores_are_those_of_the_coco_caption_tools() -> None:
    true = {place: [text] for place, text in enumerate(CUT)}
    said = {place: [text.lower().replace(".", "")] for place, text in enumerate(HYPOTHESES)}
    scores, each = caption_scores(REFERENCES, HYPOTHESES)
    bleu = Bleu(4).compute_score(true, said, verbose=0)[0]
    assert [scores[f"coco_bleu{order}"] for order in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-12)
    assert scores["coco_rouge_l"] == pytest.approx(Rouge().compute_score(true, said)[0], abs=1e-12)
    cider, single = Cider().compute_score(true, said)
    assert 0.1 < cider < 10
    assert scores["cider"] == pytest.approx(cider, abs=1e-12)
    assert each == pytest.approx(single)
    assert each is not None
    assert each[2] == 0


def test_cider_of_equal_reports_is_ten_and_order_does_not_matter() -> None:
    texts = ["a nodule in the right lung", "the heart is large today", "free air below the diaphragm"]
    scores, each = caption_scores(texts, texts)
    assert each == pytest.approx([10.0] * 3)
    assert scores["coco_bleu4"] == pytest.approx(1.0)
    turned, _ = caption_scores(REFERENCES[::-1], HYPOTHESES[::-1])
    assert turned == pytest.approx(caption_scores(REFERENCES, HYPOTHESES)[0])


def test_null_with_the_reason_where_the_library_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    scores, each = caption_scores(REFERENCES, HYPOTHESES)
    assert each is None
    assert [scores[key] for key in CAPTION_KEYS] == [None] * 6
    assert "ctx-distill[report]" in scores["captions_absent"]
    assert caption_scores([], [])[1] is None
