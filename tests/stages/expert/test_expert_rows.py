"""Whom the expert is trained on: the index's exclusions hold for its images, its reports and its vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from ctx_distill.ablation.cohort_manifests import Cohort, write_held_out
from ctx_distill.commands.main import main
from ctx_distill.data.loading.datamodules import XrayDataModule
from ctx_distill.data.manifests.manifest import read_manifest


@pytest.fixture(scope="module")
def mixed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The cohort with X-rays of held-out CT patients, lateral films and another language among its rows; and which."""
    folder = tmp_path_factory.mktemp("mixed") / "data"
    shutil.copytree(cohort, folder)
    ct, xray = (pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False) for name in ("ct", "xray"))

    def rows(split: str) -> list[int]:
        # only patients with one study, so that changing a row leaves no patient in two splits
        alone = ~xray["patient_id"].duplicated(keep=False)
        return xray.index[(xray["split"] == split) & alone].tolist()

    train, val = rows("train"), rows("val")
    patient = {split: ct.loc[ct["split"] == split, "patient_id"].iloc[0] for split in ("val", "test")}
    named = {
        "ct val": train[0], "ct test": train[1], "lateral": train[2], "spanish": train[3], "kept": train[4],
        "val of ct test": val[0], "val lateral": val[1], "val kept": val[2],
    }  # fmt: skip
    xray.loc[named["ct val"], "patient_id"] = patient["val"]
    xray.loc[named["ct test"], "patient_id"] = patient["test"]
    xray.loc[[named["lateral"], named["val lateral"]], "view"] = "lateral"
    xray.loc[named["spanish"], "language"] = "es"
    xray.loc[named["val of ct test"], "patient_id"] = patient["test"] + "x"
    ct_train = ct.index[ct["split"] == "train"]
    ct.loc[ct_train[0], ["language", "findings"]] = ["es", "Derrame pleural izquierdo."]
    ct.loc[ct_train[1], "patient_id"] = xray.loc[rows("test")[0], "patient_id"]
    for word, row in named.items():
        xray.loc[row, "findings"] = f"Marker{word.replace(' ', '')} is present."
    ct.to_csv(folder / "ct.csv", index=False)
    xray.to_csv(folder / "xray.csv", index=False)
    return folder, named


def test_training_rows_are_those_of_the_index(mixed: tuple[Path, dict[str, int]]) -> None:
    folder, named = mixed
    module = XrayDataModule(str(folder / "xray.csv"), str(folder / "ct.csv"))
    train = set(module.training_rows().frame.index)
    assert train == set(module.pool()[0].frame.index)
    assert named["kept"] in train
    assert not train & {named[word] for word in ("ct val", "ct test", "lateral", "spanish")}
    assert {"val kept", "val of ct test"} <= {
        w for w, row in named.items() if row in module.validation_rows().frame.index
    }
    assert named["val lateral"] not in module.validation_rows().frame.index


def test_views_and_languages_are_excluded_without_a_ct_manifest_too(mixed: tuple[Path, dict[str, int]]) -> None:
    folder, named = mixed
    train = set(XrayDataModule(str(folder / "xray.csv")).training_rows().frame.index)
    assert {named["ct val"], named["ct test"], named["kept"]} <= train
    assert not train & {named["lateral"], named["spanish"]}


def test_a_validation_row_of_a_ct_test_patient_chooses_nothing(
    mixed: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    folder, named = mixed
    ct = pd.read_csv(folder / "ct.csv", dtype=str, keep_default_na=False)
    row = ct.index[ct["split"] == "test"][0]
    patient = pd.read_csv(folder / "xray.csv", dtype=str).loc[named["val of ct test"], "patient_id"]
    ct.loc[ct["patient_id"] == ct.loc[row, "patient_id"], "patient_id"] = patient
    ct["root"] = str(folder)
    ct.to_csv(tmp_path / "ct.csv", index=False)
    module = XrayDataModule(str(folder / "xray.csv"), str(tmp_path / "ct.csv"))
    assert named["val of ct test"] not in module.validation_rows().frame.index
    assert named["val kept"] in module.validation_rows().frame.index
    assert module.excluded()["validation: patient is in CT test"] == 1


def test_the_stage_reads_no_excluded_row_and_counts_them(
    mixed: tuple[Path, dict[str, int]],
    tiny_preset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Images, reports, the second contrast's sections and the vocabulary's texts; the counts go into metrics and log."""
    import ctx_distill.stages.expert.task as expert

    folder, named = mixed
    read: list[str] = []
    trained: set[int] = set()
    texts, step = expert.vocabulary_texts, expert.ExpertTask.training_step

    def seen_texts(*manifests: object, **more: object) -> list[str]:
        found = texts(*manifests, **more)  # type: ignore[arg-type]
        read.extend(found)
        return found

    def seen_step(task: expert.ExpertTask, batch: expert.XrayBatch, number: int) -> object:
        trained.update(batch.row.tolist())
        read.extend([*batch.report, *(text for pair in task._sections.values() for text in pair)])
        read.extend(text for _, *pair in task._reports for text in pair)
        return step(task, batch, number)

    monkeypatch.setattr(expert, "vocabulary_texts", seen_texts)
    monkeypatch.setattr(expert.ExpertTask, "training_step", seen_step)
    run = tmp_path / "run"
    arguments = ["--data", str(folder), "--run", str(run), "--preset", str(tiny_preset), "--trainer.max_epochs=1"]
    assert main(["expert", *arguments]) == 0
    everything = " ".join(read)
    assert "Markerkept" in everything
    for word in ("ctval", "cttest", "lateral", "spanish", "valkept"):
        assert f"Marker{word} " not in everything
    assert "Derrame" not in everything
    assert not trained & {row for word, row in named.items() if word != "kept"}
    left_out = json.loads((run / "expert" / "metrics.json").read_text())["left_out"]
    xray = pd.read_csv(folder / "xray.csv", dtype=str)
    assert left_out == {
        "not in split train": int((xray["split"] != "train").sum()), "patient is in CT val or test": 2,
        "not a frontal view": 1, "language is not en": 1, "no report text": 0,
        "validation: patient is in CT test": 0, "validation: not a frontal view": 1, "validation: language is not en": 0,
        "CT train reports: patient is in X-ray val or test": 1, "CT train reports: language is not en": 1,
    }  # fmt: skip
    assert "expert: excluded 2 rows (patient is in CT val or test)" in capsys.readouterr().out


def test_the_ablation_s_expert_is_trained_on_nobody_who_is_scored(cohort: Path, tmp_path: Path) -> None:
    whole = read_manifest(cohort / "ct.csv", check_images=False)
    frame = whole.frame.assign(root=str(cohort))
    parts = Cohort(
        tmp_path, *(frame[frame["split"] == split] for split in ("train", "val", "test")), frame, whole.finding_names,
        frame[:0],
    )  # fmt: skip
    held_out = write_held_out(parts)
    assert set(held_out.frame["study_id"]) == set(parts.val["study_id"]) | set(parts.test["study_id"])
    assert set(held_out.frame["split"]) == {"val", "test"}
    xray = pd.read_csv(cohort / "xray.csv", dtype=str, keep_default_na=False).assign(root=str(cohort), split="train")
    xray.loc[[0, 1], "patient_id"] = [parts.val["patient_id"].iloc[0], parts.test["patient_id"].iloc[0]]
    xray.to_csv(tmp_path / "xray.csv", index=False)
    module = XrayDataModule(str(tmp_path / "xray.csv"), str(held_out.path))
    assert not {0, 1} & set(module.training_rows().frame.index)
