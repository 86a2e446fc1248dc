"""The ablation from cohort to table, on a handful of studies; and that it goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from ctx_distill.commands.main import main

PLAN = {
    "cohort": {"candidates": 10, "val": 6, "labelled": 6},
    "steps": 3,
    "distill_share": 0.34,
    "learning_rates": [1e-3, 2e-3],
    "selection_seed": 9,
    "probe_shares": [1.0],
    "experts": {"base": {"xrays": 32, "epochs": 1, "corpus": 8}},
    "regimes": {
        "common": {"pairs": 8, "pool": 32, "expert": "base", "seeds": [0, 1], "arms": ["infonce", "paper", "asked"]},
        "core": {},
    },
    "contrasts": [{"arm": "paper", "against": "infonce", "regime": "core", "headline": True}],
}


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    from ctx_distill.runs.stage_table import read_layer, stages_folder

    shipped = read_layer(stages_folder() / "ablation.yaml")["arms"]
    keep = ("infonce", "text-frozen", "pair-relation", "paper", "expert-projection")
    arms = {name: shipped[name] for name in keep} | {"asked": shipped["expert-projection"]}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, "arms": arms}))
    return path


@pytest.fixture
def preset(tmp_path: Path, tiny_preset: Path) -> Path:
    sections = yaml.safe_load(tiny_preset.read_text())
    sections["all"]["trainer"] |= {"logger": False, "callbacks": None}
    sections["ct"]["data"]["init_args"] |= {"with_labels": True, "projection": True}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.mark.slow
def test_from_cohort_to_table_and_on_from_there(
    cohort: Path, tmp_path: Path, plan_file: Path, preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, record = tmp_path / "run", tmp_path / "record"
    common = ["ablation", "--data", str(cohort), "--run", str(run), "--record", str(record), "--plan", str(plan_file)]
    command = [*common, "--preset", str(preset), "--workers", "2"]
    assert main([*command, "--arms", "infonce asked", "--seeds", "1"]) == 0
    rows = pd.read_csv(record / "ablation.csv")
    assert {"arm", "seed", "metric", "value", "config", "data"} <= set(rows.columns)
    assert set(rows["arm"]) == {"infonce", "asked"}
    assert len(pd.read_csv(record / "selection.csv")) == 2
    first = rows[(rows["arm"] == "infonce") & (rows["metric"] == "macro_auroc")]["value"].item()

    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 of them done before" in said
    rows = pd.read_csv(record / "ablation.csv")
    primary = rows[rows["metric"] == "macro_auroc"]
    assert sorted(zip(primary["arm"], primary["seed"], strict=True)) == [
        ("asked", 0), ("infonce", 0), ("infonce", 1), ("paper", 0), ("paper", 1),
    ]  # fmt: skip
    assert primary[(primary["arm"] == "infonce") & (primary["seed"] == 0)]["value"].item() == first
    assert {"probe_auroc_100", "report_recall_at_10"} <= set(rows["metric"])
    table = record.with_name(f"{record.name}.md").read_text()
    assert "**paper − infonce**" in table
    page = (run / "index.html").read_text()
    assert "not a medical device" in page
    assert page.count("<svg") == 1

    assert main([*command, "--again", "--arms", "infonce", "--seeds", "1"]) == 0
    again = capsys.readouterr().out
    assert f"macro AUROC {first:.3f}" in again
    assert "before" in again
    assert "OUTSIDE" not in again


def test_an_unknown_arm_is_refused_before_anything_runs(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablation", "--data", str(cohort), "--run", str(tmp_path / "r"), "--arms", "ful"]) == 2
    assert "'ful' is not known" in capsys.readouterr().err
