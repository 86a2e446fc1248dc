"""The linear probe against scikit-learn and NumPy; few-shot draws; the command."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ctx_distill
from ctx_distill.commands.main import main
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.errors import InputError
from ctx_distill.inference.model import CTModel
from ctx_distill.probing.few_shot import draw_patients, read_shots
from ctx_distill.probing.logistic import draw_shots, fit_probes

Pair = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def data() -> tuple[Pair, Pair]:
    """300 and 120 rows of 12 features of very different scales, and 3 findings that depend on them."""
    random = np.random.default_rng(0)
    x = random.normal(size=(420, 12)) * np.logspace(-2, 2, 12) + np.arange(12)
    truth = random.normal(size=(12, 3)) / np.logspace(-2, 2, 12)[:, None]
    y = ((x - x.mean(0)) @ truth + random.normal(size=(420, 3)) * 2 > 0.5).astype(float)
    y[random.random(y.shape) < 0.1] = np.nan
    y[random.random(y.shape) < 0.05] = -1
    return (x[:300], y[:300]), (x[300:], y[300:])


def test_it_is_scikit_learns(data: tuple[Pair, Pair]) -> None:
    (x, y), (val_x, val_y) = data
    strengths = (1e-3, 1e-1, 10.0)
    reached, said = [], []
    for strength in strengths:
        scaler = StandardScaler().fit(x)
        columns, scores = [], []
        for f in range(3):
            known, own = np.isin(y[:, f], (0, 1)), np.isin(val_y[:, f], (0, 1))
            model = LogisticRegression(C=strength, max_iter=5000).fit(scaler.transform(x[known]), y[known, f])
            columns.append(make_pipeline(scaler, model).predict_proba(val_x)[:, 1])
            scores.append(roc_auc_score(val_y[own, f], columns[f][own]))
        reached.append(np.mean(scores))
        said.append(np.stack(columns, axis=1))
    fit = fit_probes(*data, strengths=strengths)
    best = int(np.argmax(reached))
    assert fit.strength == strengths[best]
    assert fit.val_macro_auroc == pytest.approx(reached[best], abs=1e-6)
    np.testing.assert_allclose(fit.probabilities(val_x), said[best], atol=1e-6)


def test_it_is_the_minimum(data: tuple[Pair, Pair]) -> None:
    (x, y), _ = data
    fit = fit_probes(*data, strengths=(0.1,))
    mean, deviation = x.mean(0), x.std(0)
    for f in range(3):
        known = np.isin(y[:, f], (0, 1))
        z, p = (x[known] - mean) / deviation, fit.probabilities(x[known])[:, f]
        gradient = 0.1 * z.T @ (p - y[known, f]) + fit.weight[f] * deviation  # of C sum log-loss + |w|^2 / 2
        assert np.abs(gradient).max() < 0.02
        assert abs((p - y[known, f]).sum()) < 0.2


def test_a_finding_of_one_class_is_left_out(data: tuple[Pair, Pair]) -> None:
    (x, y), val = data
    y = y.copy()
    y[:, 1] = 0
    fit = fit_probes((x, y), val)
    assert fit.fitted.tolist() == [True, False, True]
    with pytest.raises(InputError, match="no finding has both"):
        fit_probes((x, np.zeros_like(y)), val)


def test_draws(data: tuple[Pair, Pair]) -> None:
    labels = data[0][1].copy()
    labels[:, 2] = 0
    labels[[3, 5, 8], 2] = 1
    four, eight, other = draw_shots(labels, 4, 1), draw_shots(labels, 8, 1), draw_shots(labels, 4, 2)
    for f in range(2):
        assert sorted(labels[four[f], f]) == [0] * 4 + [1] * 4
        assert set(four[f]) <= set(eight[f])
        assert set(four[f]) != set(other[f])
    assert len(four[2]) == 0  # three positives only
    assert len(draw_shots(labels, 3, 1)[2]) == 6


def test_shares_of_patients() -> None:
    patients = [f"p{n // 3}" for n in range(30)]  # three studies each
    for seed in range(5):
        rows = [draw_patients(patients, percent, seed) for percent in (1, 20, 50, 100)]
        assert [len(own) for own in rows] == [3, 6, 15, 30]
        assert all(set(small) < set(large) for small, large in pairwise(rows))
        assert all(
            {patients[n] for n in own}.isdisjoint({patients[n] for n in set(range(30)) - set(own)}) for own in rows
        )
    assert len({tuple(draw_patients(patients, 50, seed)) for seed in range(5)}) > 1


def test_amounts() -> None:
    asked = sorted(read_shots(text) for text in ("50%", "10", "0.5%", "2"))
    assert list(map(str, asked)) == ["2", "10", "0.5%", "50%"]
    for wrong in ("0", "-1", "0%", "101%", "2.5", "many"):
        with pytest.raises(InputError, match="percentages of the training patients"):
            read_shots(wrong)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run / "align", tmp_path / "run" / "align")
    return tmp_path / "run"


def test_the_command(
    run: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["probe", str(run), str(cohort / "ct.csv"), "--shots", "1", "60%", "100%", "--seeds", "2"]
    assert main(command) == 0
    assert "linear probe, test macro AUROC" in capsys.readouterr().out
    metrics = json.loads((run / "probe" / "metrics.json").read_text())
    table = pd.read_csv(run / "probe" / "predictions.csv").set_index("study_id")
    manifest = read_manifest(cohort / "ct.csv")
    test = manifest.split("test").frame.drop_duplicates("study_id").set_index("study_id")
    scores = []
    for name in table.columns:
        y = test.loc[table.index, f"label:{name}"].to_numpy()
        if len(set(y[np.isin(y, (0, 1))])) == 2:
            known = np.isin(y, (0, 1))
            scores.append(roc_auc_score(y[known], table[name].to_numpy()[known]))
    assert metrics["macro_auroc"]["value"] == pytest.approx(np.mean(scores), abs=1e-6)
    curve = pd.read_csv(run / "probe" / "few_shot.csv")
    assert list(curve["shots"]) == ["1", "60%", "100%"]
    assert ((curve["low"] <= curve["macro_auroc"]) & (curve["macro_auroc"] <= curve["high"])).all()
    assert (curve["lowest_seed"] <= curve["highest_seed"]).all()
    whole = curve.iloc[-1]  # one draw: all
    assert whole["seeds"] == 1
    assert whole["patients"] == manifest.split("train").frame["patient_id"].nunique()
    assert whole["macro_auroc"] == whole["lowest_seed"] == whole["highest_seed"]
    assert whole["macro_auroc"] == pytest.approx(metrics["macro_auroc"]["value"], abs=1e-9)
    one = curve.iloc[0]
    half = scipy.stats.t.interval(
        0.95, 1, one["macro_auroc"], scipy.stats.sem([one["lowest_seed"], one["highest_seed"]])
    )
    assert (one["seeds_low"], one["seeds_high"]) == pytest.approx(half)
    picture = ElementTree.parse(run / "probe" / "few_shot.svg").getroot()
    assert f"100%: {whole['macro_auroc']:.3f}" in picture.attrib["aria-label"]
    assert sum(item.attrib.get("class", "").startswith("mark") for item in picture) == 3

    # what it wrote is a classifier
    row = manifest.split("test").frame.index[0]
    one = ctx_distill.load(run / "probe").predict(manifest.image_file(row))
    said = table.loc[manifest.frame.at[row, "study_id"]]
    assert one.probabilities == pytest.approx(said.to_dict(), abs=1e-5)

    def never(*_: object) -> None:
        raise AssertionError("features are computed once")

    monkeypatch.setattr(CTModel, "pooled", never)
    assert main(command[:3]) == 0
