"""The reports that a vocabulary is trained on: without words that would name somebody.

A WordPiece vocabulary is published with the model, and a word of one report (a name, a hospital, a number) can become an
entry of it. Words of fewer than five patients are left out before training; a tokenizer still spells them in pieces.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.text.tokenizer import WORD

FEWEST_PATIENTS = 5


def vocabulary_texts(*manifests: Manifest, more: Sequence[str] = ()) -> list[str]:
    """Reports of the manifests, in their order, then `more`, to train a vocabulary on.

    Args:
        manifests: `train` rows. Those of the embedded phantom cohort, whose patients are nobody, are taken whole.
        more: texts without a patient's id; each counts as a patient of its own.
    """
    pairs = [
        pair
        for manifest in manifests
        for pair in zip(manifest.reports(), manifest.column("patient_id").tolist(), strict=True)
    ]
    pairs += [(text, f"text {number}") for number, text in enumerate(more)]
    texts = [text for text, _ in pairs]
    if all(manifest.synthetic for manifest in manifests):
        return texts
    return common_words(texts, [patient for _, patient in pairs], FEWEST_PATIENTS)


def common_words(texts: Sequence[str], patients: Sequence[str], fewest: int) -> list[str]:
    """The texts without the words (case aside) that stand in texts of fewer than `fewest` patients."""
    seen: dict[str, set[str]] = defaultdict(set)
    for text, patient in zip(texts, patients, strict=True):
        for word in set(re.findall(WORD, text.lower())):
            if len(seen[word]) < fewest:
                seen[word].add(patient)
    rare = {word for word, several in seen.items() if len(several) < fewest}

    def keep(match: re.Match[str]) -> str:
        return " " if match.group().lower() in rare else match.group()

    return [" ".join(re.sub(WORD, keep, text).split()) for text in texts]
