"""Runs beside each other: paired intervals against scikit-learn, what cannot be compared, what differs, unfinished runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score

from ctx_distill.commands.main import main
from ctx_distill.errors import InputError
from ctx_distill.metrics.bootstrap import Interval, resample_counts
from ctx_distill.reporting import paired
from ctx_distill.reporting.compare_page import apart, build_compare_page, difference_words, run_names
from ctx_distill.reporting.settings_section import data_warnings, setting_rows
from ctx_distill.runs.run_reader import gather

MACRO = "zero_shot.macro_auroc"


@pytest.fixture
def two(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs on one cohort, the second with other zero-shot predictions; metrics are those of the predictions."""
    runs = tmp_path / "one", tmp_path / "two"
    for number, run in enumerate(runs):
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns("index.html"))
        if number:
            path = run / "zero_shot_predictions.csv"
            frame = pd.read_csv(path)
            noise = np.random.default_rng(1).normal(0, 0.15, (len(frame), len(frame.columns) - 1))
            frame[frame.columns[1:]] = (frame[frame.columns[1:]] + noise).clip(0, 1)
            frame.to_csv(path, index=False)
        labels, scores, _ = table(run)
        record(run, {"macro_auroc": {"value": macro(roc_auc_score, labels, scores), "low": 0.1, "high": 0.9},
                     "macro": {"average_precision": macro(average_precision_score, labels, scores)}})  # fmt: skip
    return runs


def record(run: Path, values: dict[str, Any]) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["zero_shot"] |= values
    (run / "metrics.json").write_text(json.dumps(metrics))


def table(run: Path) -> tuple[Any, Any, list[str]]:
    """Labels, scores and patients of the test studies, sorted by study, straight from the files."""
    info = json.loads((run / "run.json").read_text())
    truth = pd.read_csv(info["ct"]["path"]).set_index("study_id").sort_index()
    scores = pd.read_csv(run / "zero_shot_predictions.csv").set_index("study_id").sort_index()
    truth = truth.loc[scores.index]
    return truth[[f"label:{name}" for name in scores]].to_numpy(), scores.to_numpy(), truth["patient_id"].tolist()


def macro(score: Callable[..., float], labels: Any, scores: Any) -> float:
    both = [f for f in range(labels.shape[1]) if 0 < labels[:, f].sum() < len(labels)]
    return float(np.mean([score(labels[:, f], scores[:, f]) for f in both]))


def found(key: str, one: Path, two: Path) -> Interval | str:
    base, run = gather(one), gather(two)
    return paired.difference(key, paired.sources(run), paired.sources(base), run, base)


@pytest.mark.parametrize(
    ("key", "score"), [(MACRO, roc_auc_score), ("zero_shot.macro.average_precision", average_precision_score)]
)
def test_intervals_are_those_of_scikit_learn_under_the_same_draws(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, key: str, score: Callable[..., float]
) -> None:
    monkeypatch.setattr(paired, "REPLICATES", 60)
    (labels, first, patients), (_, second, _) = map(table, two)
    drawn = []
    for counts in resample_counts(patients, 60, paired.SEED):
        rows = np.repeat(np.arange(len(labels)), counts)
        drawn.append(macro(score, labels[rows], second[rows]) - macro(score, labels[rows], first[rows]))
    result = found(key, *two)
    assert isinstance(result, Interval)
    expected = macro(score, labels, second) - macro(score, labels, first)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (result.value, result.low, result.high) == pytest.approx((expected, low, high), abs=1e-6)
    assert low < high
    back = found(key, *two[::-1])
    assert isinstance(back, Interval)
    assert (back.value, back.low, back.high) == pytest.approx((-expected, -high, -low), abs=1e-6)
    same = found(key, two[0], two[0])
    assert isinstance(same, Interval)
    assert difference_words(same).words == "the same"


def test_words_of_a_difference() -> None:
    assert difference_words(Interval(0.02, 0.01, 0.03)).words == "better"
    assert difference_words(Interval(0.02, 0.01, 0.03), lower_is_better=True).words == "worse"
    assert difference_words(Interval(-0.02, -0.03, -0.01)).words == "worse"
    unsure = difference_words(Interval(0.02, -0.01, 0.03))
    assert (unsure.numbers, unsure.words) == ("+0.020 [−0.010, +0.030]", "no difference shown")
    assert not difference_words("a reason").has_interval


def test_what_cannot_be_compared_has_no_difference(two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = two
    record(other, {"macro_auroc": 0.5})
    assert found(MACRO, one, other) == "the file does not match metrics.json"
    assert found("expert.macro_auroc", one, other) == paired.NO_FILE
    # Another cohort: a label of a test study differs.
    info = json.loads((other / "run.json").read_text())
    data = tmp_path / "data"
    shutil.copytree(Path(info["ct"]["path"]).parent, data)
    frame = pd.read_csv(data / "ct.csv")
    name = next(column for column in frame if column.startswith("label:"))
    frame.loc[frame.index[-1], name] = 1 - frame.loc[frame.index[-1], name]
    frame.to_csv(data / "ct.csv", index=False)
    info["ct"] |= {"path": str(data / "ct.csv"), "fingerprint": "ff" * 32}
    (other / "run.json").write_text(json.dumps(info))
    assert found(MACRO, one, other) == paired.OTHER_STUDIES
    told = data_warnings([gather(one), gather(other)], ["one", "two"])
    assert told == [
        "two has another CT cohort than one: metrics on it are not comparable.",
        "two and one have different labels for the same test studies: metrics are not comparable.",
    ]
    html = build_compare_page([one, other], tmp_path / "page.html").read_text()
    assert "another CT cohort" in html
    assert "better" not in html.partition("<main>")[2]
    assert data_warnings([gather(one), gather(one)], ["one", "again"]) == []


def test_settings_that_differ_and_no_others(two: tuple[Path, Path]) -> None:
    for run, rate in zip(two, (0.1, 0.2), strict=True):
        config = {
            "trainer": {"default_root_dir": f"{run}/align", "max_epochs": 3},
            "model": {"init_args": {"rate": rate, "student": f"{run}/distill/artefact", "parts": [1, 2]}},
            "data": {"init_args": {"ct_manifest": f"{run}/ct.csv"}},
        }
        (run / "align" / "config.yaml").write_text(yaml.safe_dump(config))
    (two[0] / "expert" / "config.yaml").write_text("trainer: {max_epochs: 9}\n")  # one run alone has it
    assert setting_rows([gather(run) for run in two]) == [("Robust alignment", "model.rate", ["0.1", "0.2"])]


def test_runs_that_are_not_finished(two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = two
    for name in ("metrics.json", "reports.csv", "zero_shot_predictions.csv"):
        (other / name).unlink()
    shutil.rmtree(other / "report")
    html = build_compare_page([one, other], tmp_path / "page.html").read_text()
    assert "two: Not run yet" in html
    assert "not in both" in html
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "<title>one / empty" in build_compare_page([one, empty], tmp_path / "page.html").read_text()


def test_the_page_by_the_command(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, two), "--out", str(out)]) == 0
    html = out.read_text()
    assert "− one" in html
    assert "would do so by chance" in html
    assert 'src="http' not in html
    assert "<script" not in html
    assert html.count('class="study pair"') == 4
    assert main(["compare", str(two[0]), "--out", str(out)]) == 2
    assert main(["compare", str(two[0]), str(two[0])]) == 2
    assert main(["compare", str(two[0]), str(tmp_path / "none")]) == 2
    assert "compare needs 2 to 6" in capsys.readouterr().err
    with pytest.raises(InputError, match="got the same run twice"):
        build_compare_page([two[0], two[0] / ".." / "one"], out)


def test_names_set_runs_apart() -> None:
    assert run_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert run_names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]


def test_disagreement_is_of_ranks() -> None:
    one = pd.DataFrame({"a": [0.1, 0.2, 0.3, 0.4]}, index=list("wxyz"))
    surer = one * 2
    turned = pd.DataFrame({"a": [0.4, 0.2, 0.3, 0.1]}, index=list("wxyz"))
    assert (apart([one, surer]) == 0).all(axis=None)
    assert apart([one, turned])["a"].tolist() == [0.75, 0, 0, 0.75]
