"""`ctx-distill all` on a small cohort: every file and key of the contract, and what a second run does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from ctx_distill.checkpoint import read_artefact
from ctx_distill.commands.main import main
from ctx_distill.runs.stage_table import STAGES

pytestmark = pytest.mark.full


def metrics_of(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return loaded


def value_of(metric: Any) -> float:
    return float(metric["value"] if isinstance(metric, dict) else metric)


def test_metrics_have_the_contract_s_keys(finished_run: Path, cohort: Path) -> None:
    metrics = metrics_of(finished_run)
    assert set(metrics) == {"expert", "retrieval", "distillation", "alignment", "zero_shot", "classifier", "report"}
    for path in ("retrieval.jaccard_at_1", "retrieval.jaccard_random", "zero_shot.macro_auroc",
                 "classifier.macro_auroc", "report.bleu4", "report.findings_f1"):  # fmt: skip
        stage, name = path.split(".")
        assert 0.0 <= value_of(metrics[stage][name]) <= 1.0, path
    labels = [
        name.removeprefix("label:") for name in pd.read_csv(cohort / "ct.csv").columns if name.startswith("label:")
    ]
    assert sorted(metrics["zero_shot"]["per_finding"]) == sorted(labels)


def test_every_stage_leaves_what_the_contract_names(finished_run: Path) -> None:
    for stage in STAGES.values():
        folder = finished_run / stage.folder
        for name in ("config.yaml", "metrics.json", "request.json"):
            assert (folder / name).is_file(), f"{stage.name}: {name}"
    for trained in ("expert", "distill", "align", "classifier", "report"):
        assert (finished_run / trained / "checkpoints" / "last.ckpt").is_file()
        curves = pd.read_csv(finished_run / trained / "logs" / "metrics.csv")
        assert curves["train/loss"].notna().sum() == 2, trained
        assert list((finished_run / trained / "logs").glob("events.out.tfevents.*"))
    for folder, kind in (("index", "xray-index"), ("distill", "ct-encoder"), ("align", "dual-encoder"),
                         ("classifier", "classifier"), ("report", "report-decoder")):  # fmt: skip
        read_artefact(finished_run / folder / "artefact", kind)  # type: ignore[arg-type]
    assert (finished_run / "index.html").stat().st_size > 10_000
    assert not (finished_run / ".lock.json").exists()


def test_zero_shot_score_is_scikit_learn_s_on_the_written_predictions(finished_run: Path, cohort: Path) -> None:
    predictions = pd.read_csv(finished_run / "zero_shot_predictions.csv", dtype={"study_id": str}).set_index("study_id")
    truth = pd.read_csv(cohort / "ct.csv", dtype={"study_id": str})
    test = truth[truth["split"] == "test"].drop_duplicates("study_id").set_index("study_id")
    assert sorted(predictions.index) == sorted(test.index)
    scored = metrics_of(finished_run)["zero_shot"]
    aurocs = []
    for name in predictions.columns:
        labels = test.loc[predictions.index, f"label:{name}"]
        if labels.nunique() < 2:
            assert scored["per_finding"][name] is None or scored["per_finding"][name]["value"] is None
            continue
        aurocs.append(roc_auc_score(labels, predictions[name]))
        assert value_of(scored["per_finding"][name]) == pytest.approx(aurocs[-1], abs=2e-2), name
    assert value_of(scored["macro_auroc"]) == pytest.approx(np.mean(aurocs), abs=5e-3)


def test_jaccard_at_1_is_a_hand_count_over_the_written_neighbours(finished_run: Path, cohort: Path) -> None:
    neighbours = pd.read_csv(finished_run / "index" / "retrieval.csv", dtype=str)
    ct = pd.read_csv(cohort / "ct.csv", dtype={"study_id": str}).drop_duplicates("study_id").set_index("study_id")
    xray = pd.read_csv(cohort / "xray.csv", dtype=str)
    xray = xray.assign(image=xray.get("image_id", xray["study_id"]).fillna(xray["study_id"])).set_index("image")
    labels = [name for name in ct.columns if name.startswith("label:")]
    scores = []
    for row in neighbours[neighbours["rank"] == "1"].itertuples():
        mine = {name for name in labels if ct.loc[row.study_id, name] == 1}
        theirs = {name for name in labels if float(xray.loc[row.xray_image_id, name]) == 1}
        scores.append(len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0)
    metrics = metrics_of(finished_run)["retrieval"]
    assert value_of(metrics["jaccard_at_1"]) == pytest.approx(np.mean(scores), abs=1e-6)
    assert set(xray.loc[neighbours["xray_image_id"].unique(), "split"]) == {"train"}


def test_reports_are_written_for_each_test_study(finished_run: Path, cohort: Path) -> None:
    reports = pd.read_csv(finished_run / "reports.csv", dtype=str, keep_default_na=False)
    truth = pd.read_csv(cohort / "ct.csv", dtype=str)
    assert sorted(reports["study_id"]) == sorted(truth[truth["split"] == "test"]["study_id"].unique())
    assert (reports["reference"] != "").all()


def test_a_second_run_reuses_everything(
    finished_run: Path, cohort: Path, tiny_preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("artefact/*")}
    assert main(["all", "--data", str(cohort), "--run", str(finished_run), "--preset", str(tiny_preset)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("artefact/*")} == before
    printed = capsys.readouterr().out
    assert printed.count("complete in") == len(STAGES)
    assert re.search(r"zero-shot macro AUROC, CT test\s+0\.\d+ \[0\.\d+, [01]\.\d+\]", printed)
    assert str(finished_run / "index.html") in printed


def test_a_stage_that_lost_its_metrics_is_run_again_alone(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "zero_shot" / "metrics.json").unlink()
    wanted = metrics_of(run)["zero_shot"]
    assert main(["all", "--data", str(cohort), "--run", str(run), "--preset", str(tiny_preset)]) == 0
    assert metrics_of(run)["zero_shot"] == wanted
    assert not list(run.glob("*.before-*"))


def test_an_override_reaches_the_resolved_configuration(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    import yaml

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    given = ["zero-shot", "--data", str(cohort), "--run", str(run), "--preset", str(tiny_preset)]
    assert main([*given, "--model.init_args.templates=default"]) == 0
    config = yaml.safe_load((run / "zero_shot" / "config.yaml").read_text())
    assert config["model"]["init_args"]["templates"] == "default"
    assert (run / "zero_shot.before-1" / "metrics.json").is_file()


def test_another_volume_spec_than_the_student_s_is_refused(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    given = ["align", "--data", str(cohort), "--run", str(run), "--preset", str(tiny_preset)]
    assert main([*given, "--data.init_args.volume.window=[-1000,400]"]) == 2
    message = capsys.readouterr().err
    assert "volume spec of stage 3" in message
    assert "student was distilled with" in message


def test_an_index_of_another_expert_is_refused(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished_run, run)
    given = ["--data", str(cohort), "--preset", str(tiny_preset)]
    assert main(["expert", *given, "--run", str(other), "--seed_everything=1", "--trainer.max_epochs=1"]) == 0
    capsys.readouterr()
    assert main(["distill", *given, "--run", str(run), "--expert", str(other / "expert" / "artefact")]) == 2
    message = capsys.readouterr().err
    assert "the expert that the index" in message
    assert "do not match" in message
    assert (run / "distill" / "metrics.json").is_file()
    assert not list(run.glob("distill.before-*"))


def test_a_missing_earlier_stage_is_named(
    cohort: Path, tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", "--data", str(cohort), "--run", str(tmp_path / "new"), "--preset", str(tiny_preset)]) == 2
    assert "ctx-distill expert" in capsys.readouterr().err


def test_a_data_folder_without_manifests_is_named(
    tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["expert", "--data", str(tmp_path), "--run", str(tmp_path / "r"), "--preset", str(tiny_preset)]) == 2
    assert "holds no ct.csv or ct.parquet" in capsys.readouterr().err
