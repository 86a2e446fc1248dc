"""Logistic regression per finding on frozen features, with its regularisation chosen on `val`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from ctx_distill.errors import InputError
from ctx_distill.metrics.classification import macro_auroc

Floats = NDArray[np.float64]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of scikit-learn's C to try: the loss is C * sum of cross-entropies + |w|^2 / 2, on standardised features."""


@dataclass(frozen=True)
class Fit:
    """Probes of F findings.

    Attributes:
        weight: (F, D); NaN in the row of a finding that could not be fitted.
        bias: (F,), likewise.
        strength: the chosen C.
        val_macro_auroc: macro AUROC on `val` with that C.
    """

    weight: Floats
    bias: Floats
    strength: float
    val_macro_auroc: float

    def probabilities(self, features: Floats) -> Floats:
        """Return probabilities (N, F) for features (N, D); NaN for findings that could not be fitted."""
        found: Floats = 1 / (1 + np.exp(-(features @ self.weight.T + self.bias)))
        return found

    @property
    def fitted(self) -> NDArray[np.bool_]:
        """Whether each finding has a probe, (F,)."""
        return ~np.isnan(self.bias)


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of features, both (D,); the deviation of a constant feature is 1."""

    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, features: NDArray[np.floating[Any]]) -> Scale:
        """Return those of features (N, D)."""
        mean, deviation = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        return cls(mean, np.where(deviation > 1e-8 * (1 + np.abs(mean)), deviation, 1.0))


def fit_probe(
    features: NDArray[np.floating[Any]], target: NDArray[Any], scale: Scale, **settings: Any
) -> tuple[Floats, float]:
    """Fit a logistic regression of one finding on standardised features.

    Args:
        features: (N, D), before they are standardised.
        target: (N,), of two values.
        scale: how features are standardised.
        settings: settings of scikit-learn's `LogisticRegression`.

    Returns:
        Weight (D,) and bias, for features that are not standardised.
    """
    scaled = ((features - scale.mean) / scale.deviation).astype(features.dtype)
    model = LogisticRegression(**settings).fit(scaled, target)
    weight: Floats = model.coef_[0] / scale.deviation
    return weight, float(model.intercept_[0] - weight @ scale.mean)


def fit_probes(
    train: tuple[Floats, Floats],
    val: tuple[Floats, Floats],
    strengths: tuple[float, ...] = STRENGTHS,
    rows: list[NDArray[np.intp]] | None = None,
) -> Fit:
    """Fit every finding for each C, and return the fit with the highest macro AUROC on `val`; of equal ones the smaller C.

    Features are standardised by the mean and deviation of `train`. Labels other than 1 and 0 are excluded.

    Args:
        train: (N, D) features and (N, F) labels.
        val: the same; chooses C and is not trained on.
        strengths: values of C in ascending order.
        rows: training rows per finding; None for all.

    Raises:
        InputError: no finding has both classes in `train` and in `val`.
    """
    x, y = train
    scale = Scale.of(x)
    best: Fit | None = None
    for strength in strengths:
        weight, bias = np.full((y.shape[1], x.shape[1]), np.nan), np.full(y.shape[1], np.nan)
        for f in range(y.shape[1]):
            own = np.flatnonzero((y[:, f] == 0) | (y[:, f] == 1)) if rows is None else rows[f]
            if len(np.unique(y[own, f])) == 2:
                weight[f], bias[f] = fit_probe(x[own], y[own, f], scale, C=strength, max_iter=2000)
        fit = Fit(weight, bias, strength, float("nan"))
        kept = fit.fitted
        reached = macro_auroc(val[1][:, kept], fit.probabilities(val[0])[:, kept]) if kept.any() else None
        # Values that differ by the rounding of single precision are equal.
        if reached is not None and (best is None or reached > best.val_macro_auroc + 1e-6):
            best = Fit(weight, bias, strength, reached)
    if best is None:
        raise InputError(
            "probe: no finding has both a positive and a negative in `train` and in `val`. Give a manifest with more"
            " labelled studies in both splits."
        )
    return best


def draw_shots(labels: Floats, shots: int, seed: int) -> list[NDArray[np.intp]]:
    """Draw `shots` positives and as many negatives per finding without replacement; none if there are fewer.

    Args:
        labels: (N, F).
        shots: k.
        seed: seed; the draws of one seed are nested, a smaller k in a larger one.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = []
    for column in labels.T:
        sides = [order[column[order] == value][:shots] for value in (1, 0)]
        enough = all(len(side) == shots for side in sides)
        drawn.append(np.sort(np.concatenate(sides)) if enough else np.array([], dtype=np.intp))
    return drawn
