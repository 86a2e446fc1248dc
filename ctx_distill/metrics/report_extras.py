"""Scores of reports that need more than Python: METEOR (Java), RadGraph, CheXbert and GREEN (weights, through RadEval).

Each is computed on request only. A score that cannot be computed is null, and `absent` has the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ctx_distill.metrics.captions import ABSENT, caption_input

Extra = Literal["meteor", "radgraph", "chexbert", "green"]
EXTRAS: tuple[Extra, ...] = ("meteor", "radgraph", "chexbert", "green")
RADEVAL = {"radgraph": "radgraph", "chexbert": "f1chexbert", "green": "green"}
"""Their names in RadEval 2."""
NOT_ASKED = "not requested; add it to model.init_args.extras"


def extra_scores(references: Sequence[str], hypotheses: Sequence[str], asked: Sequence[str] = ()) -> dict[str, Any]:
    """Return METEOR and RadEval's scores of generated reports.

    Args:
        references: N true reports.
        hypotheses: N generated reports.
        asked: the scores of `EXTRAS` to compute.

    Returns:
        `meteor` (METEOR 1.5 of Denkowski and Lavie, the Java program in pycocoevalcap, `-l en -norm`), `radgraph`,
        `chexbert`, `green`: a number, for RadEval's a number for each of its own keys, or None; `absent`: reasons by name.
    """
    found: dict[str, Any] = dict.fromkeys(EXTRAS)
    absent: dict[str, str] = {}
    for name in EXTRAS:
        if name not in asked:
            absent[name] = NOT_ASKED
        elif not references:
            absent[name] = "no test study has a report"
        else:
            score: Callable[[Sequence[str], Sequence[str]], Any] = _meteor if name == "meteor" else _radeval(name)
            try:
                found[name] = score(references, hypotheses)
            except (
                Exception
            ) as error:  # foreign programs and downloads fail in many ways; a run must not fail with them
                absent[name] = " ".join(str(error).split())[:300] or type(error).__name__
    return found | {"absent": absent}


def _meteor(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        raise RuntimeError(ABSENT) from error
    if shutil.which("java") is None:
        raise RuntimeError("METEOR 1.5 is a Java program, and there is no `java` on PATH")
    score, _ = Meteor().compute_score(caption_input(references), caption_input(hypotheses))
    return float(score)


def _radeval(name: Extra) -> Callable[[Sequence[str], Sequence[str]], dict[str, float]]:
    def score(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
        try:
            from radeval import RadEval
        except ImportError as error:
            raise RuntimeError(
                f"RadEval 2.2 or newer cannot be imported ({error}); install the extra `radeval`"
            ) from error
        results = RadEval(metrics=[RADEVAL[name]], show_progress=False)(refs=list(references), hyps=list(hypotheses))
        return {key: float(value) for key, value in results.items()}

    return score
