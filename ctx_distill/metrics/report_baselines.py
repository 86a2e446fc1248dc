"""Baselines of a report decoder: the nearest and the most frequent training report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctx_distill.metrics.bootstrap import Groups, interval
from ctx_distill.metrics.generation import HEADLINES, generation_report
from ctx_distill.metrics.score_blocks import Candidates
from ctx_distill.text.extractor import Vocabulary

Floats = NDArray[np.floating[Any]]
BASELINES = {"nearest": "the nearest training report", "frequent": "the most frequent training report"}
_NAMES = {"findings_f1": "findings F1", "bleu4": "BLEU-4", "cider": "CIDEr"}
_SENTENCE = re.compile(r"(?<=[.?!])\s+")


def nearest_reports(queries: Floats, keys: Floats, reports: Sequence[str]) -> list[str]:
    """Return the report of the training study with the most similar image embedding (cosine); the first of ties.

    Collective: the ranks of a run share the queries.

    Args:
        queries: (N, D) unit rows.
        keys: (M, D) unit rows, M at least 1.
        reports: M.
    """
    nearest = Candidates(keys).of_all(queries, lambda block: block.nearest().tolist())
    return [reports[place] for block in nearest for place in block]


def most_frequent_report(reports: Sequence[str]) -> str:
    """Return the report that most training studies have, ignoring white space and case.

    Ties are frequent, since free-text reports seldom repeat. They are broken by the mean number of reports that contain
    each sentence, then by position.

    Args:
        reports: training reports, at least one.
    """
    plain = [" ".join(report.split()).casefold() for report in reports]
    whole = Counter(plain)
    sentences = Counter(sentence for text in plain for sentence in set(_SENTENCE.split(text)))
    common = {text: float(np.mean([sentences[part] for part in _SENTENCE.split(text)])) for text in whole}
    best = max(range(len(plain)), key=lambda place: (whole[plain[place]], common[plain[place]], -place))
    return reports[best]


def beside_baselines(
    references: Sequence[str],
    hypotheses: Sequence[str],
    baselines: Mapping[str, Sequence[str]],
    patients: Groups,
    vocabulary: Vocabulary,
    seed: int = 0,
    n: int = 1000,
) -> dict[str, Any]:
    """Return the scores of generated reports and of the baselines, their differences, and a verdict in words.

    Args:
        references: N true reports.
        hypotheses: N generated reports.
        baselines: name of `BASELINES` -> its N reports.
        patients: N patient ids, the unit of resampling.
        vocabulary: vocabulary of the findings.
        seed: seed of the bootstrap.
        n: number of replicates.

    Returns:
        The keys of `generation.generation_report`; `baselines.<name>.<key>`, the same for each baseline;
        `against.<name>.<headline>`, decoder minus baseline with the interval of the paired difference; `verdict`.
    """
    own, drawn = generation_report(references, hypotheses, patients, vocabulary, seed, n)
    scores: dict[str, Any] = {}
    against: dict[str, dict[str, Any]] = {}
    for name, texts in baselines.items():
        scores[name], theirs = generation_report(references, texts, patients, vocabulary, seed, n)
        against[name] = {
            key: interval(own[key]["value"] - scores[name][key]["value"], drawn[key] - theirs[key]).as_json()
            for key in HEADLINES
            if key in drawn and key in theirs
        }
    return own | {"baselines": scores, "against": against, "verdict": verdict(against)}


def verdict(against: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """Return in words whether the decoder beats its baselines: in a score, if the whole interval is above 0.

    Args:
        against: name of a baseline -> score -> decoder minus baseline, {value, low, high}.
    """
    beaten, sentences = True, []
    for name, differences in against.items():
        better: list[str] = []
        not_better: list[str] = []
        for key, found in differences.items():
            value, low, high = (found[part] for part in ("value", "low", "high"))
            words = f"{_NAMES[key]} ({_signed(value)} [{_signed(low)}, {_signed(high)}])"
            (better if low is not None and low > 0 else not_better).append(words)
        beaten = beaten and bool(better) and not not_better
        said = [f"better in {', '.join(better)}"] if better else []
        said += [f"not better in {', '.join(not_better)}"] if not_better else []
        sentences.append(f"Beside {BASELINES[name]} it is {' and '.join(said) or 'not measured'}.")
    if not against:
        return "There is no training report: the decoder stands beside no baseline."
    head = "The decoder beats its baselines." if beaten else "The decoder does not beat its baselines."
    return " ".join([head, *sentences])


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"
