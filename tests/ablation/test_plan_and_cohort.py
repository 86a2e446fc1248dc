"""The plan's form, and who is drawn, chosen on and scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ctx_distill.ablation.cohort_manifests import (
    draw_pairs,
    open_cohort,
    write_corpus,
    write_ct,
    write_probe,
    write_xray,
)
from ctx_distill.ablation.plan import Plan, config_hash, job_layers, read_plan, selection_jobs, table_jobs
from ctx_distill.errors import InputError
from ctx_distill.runs.stage_table import stages_folder

SMALL = {"candidates": 8, "val": 6, "labelled": 4, "corpus": 3}


@pytest.fixture
def plan() -> Plan:
    shipped = read_plan()
    regimes = {name: replace(regime, pairs=4, pool=20) for name, regime in shipped.regimes.items()}
    return replace(shipped, cohort=SMALL, regimes=regimes)


def test_the_shipped_plan_has_every_arm_and_control_of_the_issue() -> None:
    plan = read_plan()
    assert {"infonce", "pair", "relation", "pair-relation", "relabel", "mask", "soft", "efm", "paper", "full"} <= set(
        plan.arms
    )
    assert {"shuffled", "oracle", "expert-projection", "supervised", "text-frozen"} <= set(plan.arms)
    headline = [contrast for contrast in plan.contrasts if contrast.headline]
    for contrast in headline:
        regime = plan.regimes[contrast.regime]
        assert len({*regime.seeds, *regime.more_seeds}) == 10
        assert {contrast.arm, contrast.against} <= set(regime.more_seeds_arms)
    assert all(len(regime.seeds) >= 3 for regime in plan.regimes.values())


def test_an_arm_lies_over_its_base() -> None:
    plan = read_plan()
    assert plan.arms["pair"].stages["distill"]["model"]["init_args"]["weights"] == {"pair": 1.0, "relation": 0.0}
    assert plan.arms["pair"].stages["align"] == plan.arms["pair-relation"].stages["align"]
    assert list(plan.arms["paper"].stages) == ["distill", "align", "zero-shot"]


def test_jobs_are_paired_and_an_untrained_arm_runs_once() -> None:
    plan = read_plan()
    jobs = table_jobs(plan, list(plan.arms), ["core"], None, {})
    assert [job.seed for job in jobs if job.arm.name == "full"] == list(range(10))
    assert [job.seed for job in jobs if job.arm.name == "mask"] == [0, 1, 2]
    assert [job.seed for job in jobs if job.arm.name == "expert-projection"] == [0]
    assert {job.learning_rate for job in selection_jobs(plan, ["full"])} == set(plan.learning_rates)
    assert not selection_jobs(plan, ["expert-projection"])


def test_a_hash_changes_with_what_matters_and_not_with_the_pool_of_an_arm_without_one() -> None:
    plan = read_plan()
    job = table_jobs(plan, ["infonce"], ["core"], 1, {"infonce": 1e-3})[0]
    weak = replace(job, regime=replace(job.regime, expert="weak"))
    assert config_hash(plan, job, "ablation", "") == config_hash(plan, weak, "ablation", "")
    assert config_hash(plan, job, "ablation", "") != config_hash(plan, replace(job, learning_rate=2e-3), "ablation", "")
    assert config_hash(plan, job, "ablation", "") != config_hash(replace(plan, steps=1), job, "ablation", "")
    assert config_hash(plan, job, "ablation", "") != config_hash(plan, job, "ablation", "another cohort")


def test_a_trainer_setting_of_null_is_the_default_and_no_part_of_the_hash() -> None:
    """So the committed arms, which switch clipping off, have the hashes of before it was a default."""
    plan = read_plan()
    job = table_jobs(plan, ["infonce"], ["core"], 1, {"infonce": 1e-3})[0]
    layers = job_layers(plan, job, "align", "ablation")
    assert layers["trainer"]["gradient_clip_val"] is None
    before = config_hash(plan, job, "ablation", "")

    def laid(value: float | None) -> str:
        body = {**job.arm.stages["align"], "trainer": {"gradient_clip_val": value}}
        arm = replace(job.arm, stages={**job.arm.stages, "align": body})
        return config_hash(plan, replace(job, arm=arm), "ablation", "")

    assert laid(None) == before
    assert laid(20.0) != before


def test_a_plan_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("arms: {}\n")
    with pytest.raises(InputError, match="not an ablation plan"):
        read_plan(path)


def test_a_plan_is_laid_over_its_base_and_the_shipped_ones_change_the_cohort_alone() -> None:
    shipped, fresh = read_plan(), read_plan(stages_folder() / "ablation_fresh.yaml")
    assert fresh.cohort == {**shipped.cohort, "seed": fresh.cohort["seed"]}
    assert fresh.cohort["seed"] != shipped.cohort["seed"]
    assert (fresh.regimes, fresh.contrasts, fresh.learning_rates, fresh.steps, fresh.experts) == (
        shipped.regimes, shipped.contrasts, shipped.learning_rates, shipped.steps, shipped.experts,
    )  # fmt: skip
    assert {name: arm.stages for name, arm in fresh.arms.items()} == {
        name: arm.stages for name, arm in shipped.arms.items()
    }


def test_a_cohort_of_another_seed_is_refused(cohort: Path, plan: Plan) -> None:
    with pytest.raises(InputError, match=r"cohort.json: made with seed 5, the plan's cohort has seed 7"):
        open_cohort(cohort, replace(plan, cohort={**SMALL, "seed": 7}))


def test_no_patient_is_in_two_parts_and_selection_sees_no_test_patient(cohort: Path, plan: Plan) -> None:
    parts = open_cohort(cohort, plan)
    groups = [set(frame["patient_id"]) for frame in (parts.candidates, parts.val, parts.test, parts.unused)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    chosen = write_ct(parts, plan.regimes["core"], 3, select=True)
    scored = write_ct(parts, plan.regimes["core"], 3, select=False)
    assert not set(chosen.frame["patient_id"]) & groups[2]
    assert set(scored.split("test").frame["patient_id"]) == groups[2]
    assert list(chosen.split("train").frame["study_id"]) == list(scored.split("train").frame["study_id"])


def test_fewer_pairs_are_part_of_more(cohort: Path, plan: Plan) -> None:
    parts, core = open_cohort(cohort, plan), plan.regimes["core"]
    few, many = (set(draw_pairs(parts, replace(core, pairs=n), 1)["study_id"]) for n in (3, 7))
    assert few < many
    assert few != set(draw_pairs(parts, replace(core, pairs=3), 2)["study_id"])


def test_the_share_of_normals_is_what_is_asked(cohort: Path, plan: Plan) -> None:
    parts = open_cohort(cohort, plan)
    labels = [f"label:{name}" for name in parts.labels]
    normals = int((parts.candidates[labels] != 1).all(axis=1).sum())
    regime = replace(plan.regimes["core"], pairs=normals + 2, normals=normals / (normals + 2))
    drawn = draw_pairs(parts, regime, 0)
    assert int((drawn[labels] != 1).all(axis=1).sum()) == normals
    with pytest.raises(InputError, match="too few studies"):
        draw_pairs(parts, replace(regime, pairs=8, normals=1.0), 0)


def test_corpus_pool_and_probe(cohort: Path, plan: Plan) -> None:
    parts = open_cohort(cohort, plan)
    reports = set(parts.candidates["findings"]) | set(parts.val["findings"]) | set(parts.test["findings"])
    corpus = write_corpus(parts, 3).read_text()
    assert corpus.count("\n") >= 4
    assert not any(report in corpus for report in reports)
    assert len(write_xray(parts, 20).split("train")) == 20
    probe = write_probe(parts, 4)
    assert len(probe.split("train")) == 4
    assert list(probe.frame["study_id"])[-len(parts.test) :] == list(parts.test["study_id"])


def test_a_small_cohort_is_refused_with_the_number_needed(cohort: Path) -> None:
    shipped = read_plan()
    with pytest.raises(InputError, match="needs 1320"):
        open_cohort(cohort, replace(shipped, cohort={**shipped.cohort, "seed": 5}))
