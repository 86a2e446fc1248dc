"""The scores of the COCO caption tools: BLEU-1 to 4, ROUGE-L and CIDEr by pycocoevalcap's own scorers, without Java.

pycocoevalcap (Chen et al., arXiv 1504.00325) tokenizes with Stanford's PTBTokenizer, a Java program, and scores in Python.
We call its scorers unchanged. The tokens come from `caption_tokens`: Penn Treebank tokens of nltk by the same rules (lower
case, without COCO's punctuation marks). CIDEr is that of `pycocoevalcap.cider` (Vedantam et al., CVPR 2015): sigma 6, document
frequencies of the references that are scored, from 0 to 10. torchmetrics has no CIDEr.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""The marks that pycocoevalcap's tokenizer drops. Its list has brackets in capitals, so they remain in lower-case text."""

CAPTION_KEYS = ("coco_bleu1", "coco_bleu2", "coco_bleu3", "coco_bleu4", "coco_rouge_l", "cider")
_ORDER = 4
ABSENT = "pycocoevalcap is not installed: `pip install 'ctx-distill[report]'`"
_SENTENCE = re.compile(r"(?<=[.?!])\s+|[\r\n]+")
_FULL_STOP = re.compile(r"(?<=[^\W\d_]{4})\.$")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-"}


def caption_tokens(text: str) -> str:
    """Return the lower-case Penn Treebank tokens of a text, joined by spaces, without COCO's punctuation marks."""
    from nltk.tokenize import NLTKWordTokenizer

    cut = NLTKWordTokenizer()
    words = [word.lower() for sentence in _SENTENCE.split(text) for word in cut.tokenize(sentence)]
    words = [_BRACKETS.get(word, _FULL_STOP.sub("", word)) for word in words]
    return " ".join(word for word in words if word not in PUNCTUATION)


def caption_scores(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[dict[str, Any], Floats | None]:
    """Return BLEU-1 to 4, ROUGE-L and CIDEr of the COCO caption tools, with one reference per report.

    Args:
        references: N true reports.
        hypotheses: N generated reports.

    Returns:
        `coco_bleu1` to `coco_bleu4`, `coco_rouge_l` and `cider`, and the CIDEr of each report (N,), of which `cider` is the
        mean. The document frequencies are those of all N references. All are None for an empty corpus. If pycocoevalcap
        is not installed, all are None and `captions_absent` has the reason.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        return {**dict.fromkeys(CAPTION_KEYS), "captions_absent": ABSENT}, None
    if not references:
        return dict.fromkeys(CAPTION_KEYS), None
    true, said = caption_input(references), caption_input(hypotheses)
    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints its lengths
        bleu, _ = Bleu(_ORDER).compute_score(true, said)
    rouge, _ = Rouge().compute_score(true, said)
    cider, each = Cider().compute_score(true, said)
    scores = {f"coco_bleu{order}": float(value) for order, value in enumerate(bleu, start=1)}
    return scores | {"coco_rouge_l": float(rouge), "cider": float(cider)}, np.asarray(each, dtype=np.float64)


def caption_input(texts: Sequence[str]) -> dict[int, list[str]]:
    """Return texts in the format of the COCO scorers: number -> list of one tokenized sentence."""
    return {place: [caption_tokens(text)] for place, text in enumerate(texts)}
