"""What failed, read from what a run leaves behind; flat curves; and one sentence where nothing failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ctx_distill.reporting import build_page
from ctx_distill.reporting.failures_section import failures
from ctx_distill.reporting.plots import learning_curves
from ctx_distill.runs.run_reader import gather


def section(run: Path) -> str:
    build_page(run)
    html = (run / "index.html").read_text()
    return " ".join(html.partition('<section id="failed"')[2].partition("</section>")[0].split())


def test_a_run_with_faults(make_run: Callable[..., Path]) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["alignment"]  # broken off
    metrics["zero_shot"]["not_scored"] = ["pneumonia"]
    metrics["classifier"] |= {"positives": {"emphysema": 0}, "negatives": {"emphysema": 30}}
    metrics["report"] |= {"empty": 2, "reports": 30}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "align" / "ranks").mkdir()
    rank = {"rank": 0, "step": 35, "phase": "train batch 2", "at": "align.py:40", "ended": "SIGTERM"}
    (run / "align/ranks/rank-0.json").write_text(json.dumps(rank))
    (run / "distill/training.json").write_text(json.dumps({"steps": 400, "skipped_steps": 7}))
    (run / "distill/fault").mkdir()
    fault = {
        "step": 120, "epoch": 3, "gradient_norm": "nan", "learning_rate": [0.1], "last_norms": [1.5, 2.25],
        "ranks": [{"rank": 0, "losses": ["nan"], "rows": [[4, 9]], "tensors": "x"}],
        "not_finite": {"gradients": ["a", "b"], "weights": []},
    }  # fmt: skip
    (run / "distill/fault/step-120.json").write_text(json.dumps(fault))
    (run / "distill/fault/step-130.json").write_text('{"step": 1')  # half written
    (run / "distill/logs/set_aside.csv").write_text('row,reason\n5,"ct/x.nii.gz: truncated, <b>"\n')
    (run / "slurm").mkdir()
    said = "[10:00] attempt 1 on n1\n[11:00] failed with status 1; requeued\n[11:01] attempt 2 on n2\n"
    (run / "slurm/report-17.out").write_text(said)
    (run / "slurm/prepare-3.out").write_text("attempt 1 on n1\n")

    told = section(run)
    assert "Running or interrupted" in told
    assert "last line of its log: epoch 11, step 35" in told
    assert "no checkpoint: it will start from the beginning" in told
    assert "rank 0 at step 35: train batch 2, align.py:40; ended: SIGTERM" in told
    assert "7 of 400 steps were skipped" in told
    assert "Training failed at step 120 (epoch 3)" in told
    assert "loss nan; gradient norm nan; last finite norms 1.5, 2.25" in told
    assert "manifest rows of the batch: 4, 9" in told
    assert "non-finite gradients: 2" in told
    assert "ct005.nii" not in told
    assert "1 image was unreadable" in told
    assert "truncated, &lt;b&gt;" in told
    assert "pneumonia" in told
    assert "emphysema: 0 studies with and 30 without it" in told
    assert "2 of 30 generated reports are empty" in told
    assert "requeued 1 time." in told
    assert "[11:00] failed with status 1; requeued" in told
    assert "No failures in this run" not in told
    stages = [one.stage for one in failures(gather(run))]
    assert stages.count("distill") == 4
    assert stages[-1] == "report"
    page = (run / "distill/index.html").read_text()
    assert "Training failed at step 120" in page
    assert "pneumonia" not in page


def test_a_run_without_faults_says_so_in_one_sentence(make_run: Callable[..., Path]) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    for key in ("zero_shot", "classifier"):
        del metrics[key]["per_finding"]["emphysema"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    for stage in ("expert", "distill", "align"):
        (run / stage / "training.json").write_text(json.dumps({"steps": 36, "skipped_steps": 0}))
    (run / "zero_shot").mkdir()
    assert failures(gather(run)) == []
    told = section(run)
    assert told.count("<p>") == 1
    assert "No failures in this run" in told
    assert "<table" not in told


def test_terms_that_never_change_are_named_and_not_drawn(make_run: Callable[..., Path]) -> None:
    log = pd.DataFrame({"epoch": [0, 1, 2, 3], "step": [9, 19, 29, 39]})
    log["train/loss"] = [1.0, 0.5, 0.25, 0.2]
    log["train/skipped_steps"] = 0.0
    log["val/flat_here"] = 0.5
    log["train/flat_here"] = [0.1, 0.2, 0.3, 0.4]
    curves = {curve.term: curve for curve in learning_curves(log)}
    assert {term for term, curve in curves.items() if curve.is_flat} == {"skipped_steps"}
    assert not learning_curves(log.iloc[:1])[0].is_flat  # one point says nothing of change
    run = make_run()
    log.to_csv(run / "align/logs/metrics.csv", index=False)
    build_page(run)
    html = (run / "align/index.html").read_text()
    assert 'aria-label="loss by epoch' in html
    assert 'aria-label="skipped_steps' not in html
    assert "Constant, not plotted: skipped_steps (train 0)." in html
