"""Select the report texts that a vocabulary is trained on, without words that could identify a patient.

A WordPiece vocabulary is published with the model, and a word of one report (a name, a hospital, a number) could become
an entry. Words that occur in reports of fewer than five patients are removed before training; the tokenizer still
spells them in pieces.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.text.tokenizer import WORD

FEWEST_PATIENTS = 5


def vocabulary_texts(*manifests: Manifest, more: Sequence[str] = ()) -> list[str]:
    """Return the reports of the manifests, in their order, then `more`, to train a vocabulary on.

    Args:
        manifests: `train` rows. Reports of synthetic cohorts, which describe no real patient, are used unchanged.
        more: Texts without a patient id; each counts as a separate patient.
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
    """Return the texts without the words (ignoring case) that occur for fewer than `fewest` patients."""
    seen: dict[str, set[str]] = defaultdict(set)
    for text, patient in zip(texts, patients, strict=True):
        for word in set(re.findall(WORD, text.lower())):
            if len(seen[word]) < fewest:
                seen[word].add(patient)
    rare = {word for word, several in seen.items() if len(several) < fewest}

    def keep(match: re.Match[str]) -> str:
        return " " if match.group().lower() in rare else match.group()

    return [" ".join(re.sub(WORD, keep, text).split()) for text in texts]
