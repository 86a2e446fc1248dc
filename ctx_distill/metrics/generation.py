"""Scores of generated reports: BLEU-1 to 4 and ROUGE-L (torchmetrics), CIDEr, agreement of extracted findings.

BLEU is the corpus score over lower-cased text in mteval-v13a tokens (sacrebleu's "13a": punctuation is a token), with one
reference, without smoothing, in [0, 1]. BLEU-n is the geometric mean of the precisions of 1 to n words. The COCO caption
tools, which most papers use, drop punctuation first, so their figures differ a little. They are reported beside ours
under `coco_` (`metrics.captions`).

torchmetrics counts the n-grams of each report; the counts are combined here, since the bootstrap combines them for
every replicate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctx_distill.metrics.bootstrap import Groups, Interval, interval, ratio, resample_counts
from ctx_distill.metrics.captions import caption_scores
from ctx_distill.text.extractor import Vocabulary, extract_many

Floats = NDArray[np.float64]
_ORDER = 4
_KEYS = tuple(f"bleu{order}" for order in range(1, _ORDER + 1))


def _check(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses; expected equal numbers.")


def bleu_statistics(references: Sequence[str], hypotheses: Sequence[str]) -> Floats:
    """Return the counts from which corpus BLEU is computed, (N, 10).

    Columns: matching 1- to 4-grams, all 1- to 4-grams, words of the hypothesis, words of the reference. They add up
    over reports, so the bootstrap computes them only once.
    """
    from torchmetrics.text import SacreBLEUScore

    _check(references, hypotheses)
    scorer = SacreBLEUScore(n_gram=_ORDER, tokenize="13a", lowercase=True)
    rows = np.zeros((len(references), 2 * _ORDER + 2))
    for row, (reference, hypothesis) in enumerate(zip(references, hypotheses)):
        scorer.reset()
        scorer.update([hypothesis.rstrip()], [[reference.rstrip()]])  # as sacrebleu, which strips the end of a line
        lengths = scorer.preds_len, scorer.target_len
        rows[row] = [*scorer.numerator.tolist(), *scorer.denominator.tolist(), *map(float, lengths)]
    return rows


def _bleu(statistics: Floats) -> Floats:
    """Return BLEU-1 to 4 (..., 4) of summed statistics (..., 10); 0 where a precision is 0."""
    matches, totals = statistics[..., :_ORDER], statistics[..., _ORDER : 2 * _ORDER]
    length, reference = statistics[..., 2 * _ORDER, None], statistics[..., 2 * _ORDER + 1, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(matches > 0, np.log(matches / totals), -np.inf)
        brevity = np.where(length > 0, np.minimum(0.0, 1 - reference / length), -np.inf)
    result: Floats = np.exp(np.cumsum(logs, axis=-1) / np.arange(1, _ORDER + 1) + brevity)
    return result


def bleu(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float | None]:
    """Return corpus BLEU-1 to 4 in [0, 1]; the module docstring describes tokens and smoothing.

    Args:
        references: N true reports.
        hypotheses: N generated reports; "" is allowed and counts against the length.

    Returns:
        `bleu1` to `bleu4`; None for an empty corpus, 0 where no n-gram matches.

    Raises:
        ValueError: the numbers of references and hypotheses differ.
    """
    statistics = bleu_statistics(references, hypotheses)
    if not len(statistics):
        return dict.fromkeys(_KEYS)
    return {key: float(value) for key, value in zip(_KEYS, _bleu(statistics.sum(0)))}


def rouge_l(references: Sequence[str], hypotheses: Sequence[str]) -> float | None:
    """Return the mean F of ROUGE-L (without stemming) over N reports; None for an empty corpus.

    Raises:
        ValueError: the numbers of references and hypotheses differ.
    """
    from torchmetrics.functional.text import rouge_score

    _check(references, hypotheses)
    if not references:
        return None
    scores = rouge_score(list(hypotheses), [[reference] for reference in references], rouge_keys="rougeL")
    return float(scores["rougeL_fmeasure"])


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _findings_counts(references: Sequence[str], hypotheses: Sequence[str], vocabulary: Vocabulary) -> Floats:
    """Return true positives, false positives and false negatives of present findings, (3, N, F)."""
    _check(references, hypotheses)
    true, said = extract_many(references, vocabulary) == 1, extract_many(hypotheses, vocabulary) == 1
    return np.stack([true & said, ~true & said, true & ~said]).astype(np.float64)


def _scores(counts: Floats) -> dict[str, float | None]:
    hits, extra, missed = counts.sum(1)  # (F,) each
    stated = (hits + missed) > 0
    macro = ratio(2 * hits, 2 * hits + extra + missed)[stated]
    precisions, recalls = ratio(hits, hits + extra)[stated], ratio(hits, hits + missed)[stated]
    total_hits, total_extra, total_missed = hits.sum(), extra.sum(), missed.sum()
    return {
        "precision": _number(ratio(total_hits, total_hits + total_extra)),
        "recall": _number(ratio(total_hits, total_hits + total_missed)),
        "f1": _number(ratio(2 * total_hits, 2 * total_hits + total_extra + total_missed)),
        "macro_precision": float(np.nan_to_num(precisions).mean()) if stated.any() else None,
        "macro_recall": float(recalls.mean()) if stated.any() else None,
        "macro_f1": float(macro.mean()) if stated.any() else None,
    }


def findings_scores(
    references: Sequence[str], hypotheses: Sequence[str], vocabulary: Vocabulary
) -> dict[str, float | None]:
    """Return the clinical agreement: findings asserted by generated reports against those asserted by true reports.

    Both are extracted with `ctx_distill.text.extractor.extract_many`; uncertain and absent findings are not asserted.

    Args:
        references: N true reports.
        hypotheses: N generated reports; "" asserts nothing.
        vocabulary: F findings.

    Returns:
        `precision`, `recall`, `f1` over all pairs of report and finding (micro), and `macro_precision`, `macro_recall`,
        `macro_f1`, means over the findings that a reference asserts. Precision is 0 for a finding that no generated
        report asserts, as with scikit-learn's zero_division=0. None if the denominator is 0 (no finding asserted).

    Raises:
        ValueError: the numbers of references and hypotheses differ.
    """
    return _scores(_findings_counts(references, hypotheses, vocabulary))


HEADLINES = ("findings_f1", "bleu4", "cider")
"""Scores with an interval, in which a decoder is compared with the baselines."""


def generation_report(
    references: Sequence[str],
    hypotheses: Sequence[str],
    patients: Groups,
    vocabulary: Vocabulary,
    seed: int = 0,
    n: int = 1000,
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Return all scores of generated reports.

    Args:
        references: N true reports.
        hypotheses: N generated reports.
        patients: N patient ids, the unit of resampling.
        vocabulary: vocabulary of the findings.
        seed: seed of the bootstrap.
        n: number of replicates.

    Returns:
        The scores, and the replicates (n,) of each defined headline. Equal patients and seeds draw equal replicates, so
        differences of two systems are paired. The scores are `bleu1` to `bleu4`, `rouge_l`, those of
        `captions.caption_scores`, `findings_precision`, `findings_recall`, `findings_f1` (micro),
        `findings_macro_precision`, `findings_macro_recall`, `findings_macro_f1`, `reports` and `empty` (the number of
        empty generated reports). `HEADLINES` have intervals (value, low, high). Undefined scores are None, as all are for
        an empty corpus.

    Raises:
        ValueError: lengths differ.
    """
    _check(references, hypotheses)
    if len(patients) != len(references):
        raise ValueError(f"{len(references)} references and {len(patients)} patients; expected equal numbers.")
    counts = _findings_counts(references, hypotheses, vocabulary)
    findings = _scores(counts)
    captions, ciders = caption_scores(references, hypotheses)
    scores: dict[str, Any] = dict.fromkeys(_KEYS)
    values: dict[str, float | None] = {"findings_f1": findings["f1"], "bleu4": None, "cider": captions["cider"]}
    drawn: dict[str, Floats] = {}
    if len(references):
        statistics = bleu_statistics(references, hypotheses)
        scores = {key: float(value) for key, value in zip(_KEYS, _bleu(statistics.sum(0)))}
        values["bleu4"] = scores["bleu4"]
        weights = resample_counts(patients, n, seed).astype(np.float64)
        drawn["bleu4"] = _bleu(weights @ statistics)[:, -1]
        hits, extra, missed = (weights @ counts.sum(2).T).T
        drawn["findings_f1"] = ratio(2 * hits, 2 * hits + extra + missed)
        if ciders is not None:
            drawn["cider"] = weights @ ciders / weights.sum(1)
    report = {
        **scores,
        "rouge_l": rouge_l(references, hypotheses),
        **captions,
        **{f"findings_{name}": value for name, value in findings.items()},
        "reports": len(references),
        "empty": sum(not hypothesis.strip() for hypothesis in hypotheses),
    }
    for name, value in values.items():
        found = interval(value, drawn[name]) if name in drawn and value is not None else Interval(value)
        report[name] = found.as_json()
    return report, {name: replicates for name, replicates in drawn.items() if values[name] is not None}
