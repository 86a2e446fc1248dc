"""Where the models are wrong: counts beside scikit-learn's, which errors are shown, and the report's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix

from ctx_distill.reporting import build_page
from ctx_distill.reporting.errors_section import Error, choose_errors, confusion, find_errors, shown_errors, speaks_of
from ctx_distill.runs.run_reader import gather

FINDINGS = ("cardiomegaly", "consolidation", "pleural effusion", "lung nodule", "atelectasis", "emphysema")


def set_thresholds(run: Path, values: dict[str, float | None]) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["zero_shot"]["findings"] = {
        name: {"threshold": value, "threshold_reason": None if value is not None else "val has 0 studies with it"}
        for name, value in values.items()
    }
    (run / "metrics.json").write_text(json.dumps(metrics))


def test_counts_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice([1.0, 0.0, -1.0, np.nan], 300, p=[0.3, 0.5, 0.1, 0.1])
    scores = np.round(rng.random(300), 1)  # so that some lie exactly at the threshold
    scores[:5] = np.nan
    known = np.isin(truth, (0, 1)) & ~np.isnan(scores)
    (tn, fp), (fn, tp) = confusion_matrix(truth[known], scores[known] >= 0.5)
    found = confusion("x", truth, scores, 0.5)
    assert (found.tp, found.fp, found.fn, found.tn) == (tp, fp, fn, tn)
    assert found.sensitivity == tp / (tp + fn)
    assert found.specificity == tn / (tn + fp)
    assert confusion("x", [0.0, 0.0], [0.1, 0.9], 0.5).sensitivity is None


def test_the_page_counts_the_test_studies_at_the_thresholds_of_val(make_run: Callable[..., Path]) -> None:
    run = make_run()
    set_thresholds(run, dict.fromkeys(FINDINGS[:-1], 0.5) | {"emphysema": None})
    truth = pd.read_csv(json.loads((run / "run.json").read_text())["ct"]["path"]).set_index("study_id")
    scores = pd.read_csv(run / "zero_shot_predictions.csv").set_index("study_id")
    test = truth.index[truth["split"] == "test"]
    build_page(run)
    html = (run / "index.html").read_text()
    part = html.partition('id="wrong"')[2].partition('class="cases"')[0]
    for name in FINDINGS[:-1]:
        (tn, fp), (fn, tp) = confusion_matrix(truth.loc[test, f"label:{name}"], scores.loc[test, name] >= 0.5)
        row = re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', part, re.S)
        assert row is not None
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", row.group(1))
        assert cells[1:5] == [str(tp), str(fp), str(fn), str(tn)]
        assert cells[5] == (f"{tp / (tp + fn):.3f}" if tp < tp + fn else "1.000")
    assert "emphysema (val has 0 studies with it)" in html


def test_errors_shown_are_the_farthest_beyond_the_threshold(make_run: Callable[..., Path]) -> None:
    run = make_run()
    set_thresholds(run, {"cardiomegaly": 0.5, "consolidation": 0.8, "lung nodule": 0.5})
    path = Path(json.loads((run / "run.json").read_text())["ct"]["path"])
    ids = pd.read_csv(path).query("split == 'test'")["study_id"].tolist()
    truth = pd.read_csv(path)
    truth[[f"label:{name}" for name in FINDINGS]] = 0
    patient = truth["study_id"] == ids[2]
    truth.loc[patient, "patient_id"] = truth.loc[
        truth["study_id"] == ids[0], "patient_id"
    ].item()  # 0 and 2: one person
    truth.loc[truth["study_id"] == ids[4], "label:lung nodule"] = 1
    truth.loc[truth["study_id"] == ids[5], "label:lung nodule"] = -1  # uncertain: never wrong
    other = path.with_name("chosen.csv")
    truth.to_csv(other, index=False)
    info = json.loads((run / "run.json").read_text())
    info["ct"]["path"] = str(other)
    (run / "run.json").write_text(json.dumps(info))
    scores = pd.DataFrame(0.0, columns=["cardiomegaly", "consolidation", "lung nodule"], index=ids)
    scores.loc[ids[0], "cardiomegaly"] = 0.9  # (0.9 - 0.5) / 0.5 = 0.8
    scores.loc[ids[1], "cardiomegaly"] = 0.7  # 0.4, but its finding is taken
    scores.loc[ids[2], "consolidation"] = 0.94  # 0.7, but its patient is taken
    scores.loc[ids[3], "consolidation"] = 0.8  # at the threshold: called present, margin 0
    scores.loc[ids[4], "lung nodule"] = 0.1  # (0.5 - 0.1) / 0.5
    scores.loc[ids[5], "lung nodule"] = 0.99
    scores.rename_axis("study_id").reset_index().to_csv(run / "zero_shot_predictions.csv", index=False)
    gathered = gather(run)
    _, every = find_errors(gathered, "zero_shot")
    assert [(e.study_id, e.kind) for e in every] == [
        (ids[0], "false positive"),
        (ids[4], "false negative"),
        (ids[2], "false positive"),
        (ids[1], "false positive"),
        (ids[3], "false positive"),
    ]
    assert [e.margin for e in every] == pytest.approx([0.8, 0.8, 0.7, 0.4, 0.0])
    shown = shown_errors(gathered, "zero_shot")
    assert [(e.study_id, e.finding) for e in shown] == [
        (ids[0], "cardiomegaly"),
        (ids[3], "consolidation"),
        (ids[4], "lung nodule"),
    ]


def test_a_handful_and_no_more() -> None:
    many = [Error("zero_shot", "false positive", f"s{i}", f"p{i}", i, f"f{i}", 0.9, 0.5, 1 - i / 10) for i in range(9)]
    assert [e.study_id for e in choose_errors(many, "false positive", 3)] == ["s0", "s1", "s2"]
    assert choose_errors(many, "false negative", 3) == []


def test_the_sentences_that_speak_of_a_finding() -> None:
    text = "The heart is enlarged. No pleural effusion.\nA nodule of 9 mm lies in the left upper lobe."
    assert speaks_of(text, "lung nodule", FINDINGS) == (("A nodule of 9 mm lies in the left upper lobe.",), 1)
    assert speaks_of(text, "pleural effusion", FINDINGS) == (("No pleural effusion.",), 0)
    assert speaks_of(text, "emphysema", FINDINGS) == ((), None)


@pytest.mark.parametrize(
    ("label", "report", "said"),
    [
        (1, "No pleural effusion.", "The report denies it, but the label is present: check the label first."),
        (
            0,
            "A left pleural effusion is seen.",
            "The report asserts it, but the label is absent: check the label first.",
        ),
        (0, "No pleural effusion.", "The report denies it, in agreement with the label."),
        (1, "A left pleural effusion is seen.", "The report asserts it, in agreement with the label."),
        (1, "The heart is enlarged.", "the text does not support the label."),
        (0, "The heart is enlarged.", "The report does not mention it."),
    ],
)
def test_the_report_is_held_against_the_label(
    make_run: Callable[..., Path], label: int, report: str, said: str
) -> None:
    run = make_run()
    set_thresholds(run, {"pleural effusion": 0.5})
    info = json.loads((run / "run.json").read_text())
    truth = pd.read_csv(info["ct"]["path"])
    study = truth.query("split == 'test'")["study_id"].iloc[0]
    truth = truth[truth["study_id"] == study].assign(findings=report, impression="")
    truth["label:pleural effusion"] = label
    other = Path(info["ct"]["path"]).with_name("one.csv")
    truth.to_csv(other, index=False)
    info["ct"]["path"] = str(other)
    (run / "run.json").write_text(json.dumps(info))
    (run / "zero_shot_predictions.csv").write_text(f"study_id,pleural effusion\n{study},{1 - label}\n")
    build_page(run)
    html = (run / "index.html").read_text()
    case = html.partition('<article class="case"')[2].partition("</article>")[0]
    assert f"False {'negative' if label else 'positive'}: pleural effusion" in case
    assert said in " ".join(case.split())
    assert ("doubt" in case) == ("label first" in said or "does not support" in said)
