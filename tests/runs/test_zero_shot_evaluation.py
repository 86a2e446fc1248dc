"""`ctx-distill evaluate` on the tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from ctx_distill.commands.evaluate import evaluate
from ctx_distill.commands.main import build_app, main
from ctx_distill.errors import InputError
from ctx_distill.metrics.protocols import CT_RATE_18, PROTOCOLS, comparability
from ctx_distill.text.extractor import load_vocabulary
from ctx_distill.text.prompts import load_templates, prompt_pairs


def relabelled(cohort: Path, path: Path, **change: Any) -> Path:
    """The cohort's CT manifest elsewhere, changed."""
    frame = pd.read_csv(cohort / "ct.csv", dtype=str, keep_default_na=False)
    frame["root"] = str(cohort)
    change["edit"](frame)
    frame.to_csv(path, index=False)
    return path


def ask(*arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments)]) == 0
    out = Path(str(arguments[arguments.index("--out") + 1]))
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def test_protocols_hold_the_labels_of_the_papers() -> None:
    choices = get_args(get_args(get_type_hints(evaluate)["protocol"])[0])
    assert choices == tuple(PROTOCOLS)
    assert list(CT_RATE_18) == load_vocabulary("ct-rate").names
    assert set(CT_RATE_18) - set(PROTOCOLS["fvlm-16"]) == {"Medical material", "Lymphadenopathy"}
    assert [len(names) for names in PROTOCOLS.values()] == [18, 16]


def test_only_a_whole_protocol_on_as_many_studies_counts_as_comparable() -> None:
    whole = {"protocol": "ct-rate-18", "not_scored": [], "studies": 1564, "patients": 1304, "synthetic": False}
    assert "NOT COMPARABLE" not in comparability(whole)
    for change in ({"synthetic": True}, {"protocol": "labels"}, {"not_scored": ["Emphysema"]}, {"studies": 3039}):
        assert "NOT COMPARABLE" in comparability(whole | change)


def test_overrides_are_not_taken_for_options_or_arguments() -> None:
    given = ["--trainer.devices", "2", "--data.init_args.prepared=/a run/prepared"]
    _, bound, _ = build_app().parse_args(["zero-shot", "--run", "a run", *given, "--force"], exit_on_error=False)
    assert bound.args == tuple(given)
    assert bound.kwargs["options"].run == Path("a run")
    assert bound.kwargs["force"] is True
    _, bound, _ = build_app().parse_args(["evaluate", "--no-synonyms", "a", "b", *given], exit_on_error=False)
    assert bound.args == (Path("a"), Path("b"), *given)
    assert bound.kwargs["synonyms"] is False


def test_the_stage_takes_an_override_with_a_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["zero-shot", "--data", str(tmp_path / "none"), "--run", str(tmp_path / "a run")]
    assert main([*given, f"--data.init_args.prepared={tmp_path}/a run/prepared"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_templates_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "pairs.yaml"
    path.write_text('- ["{Finding} is visible.", "Without {finding}."]\n')
    assert prompt_pairs("Lung_nodule", templates=load_templates(str(path))) == (
        ["Lung nodule is visible."], ["Without lung nodule."],
    )  # fmt: skip
    for text in ("a: 1", "- [one]", '- ["no placeholder", "x"]', "- [", "[]"):
        path.write_text(text)
        with pytest.raises(InputError, match="pairs"):
            load_templates(str(path))
    with pytest.raises(InputError, match="'other'"):
        load_templates("other")


@pytest.mark.full
def test_it_equals_the_stage_and_writes_what_it_says(
    finished_run: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ask(finished_run, cohort / "ct.csv", "--out", tmp_path)
    assert metrics == json.loads((finished_run / "zero_shot" / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert "NOT COMPARABLE: this run is scored on synthetic phantoms" in printed
    assert "CT-CLIP" in printed
    table = (tmp_path / "table.md").read_text()
    assert "NOT COMPARABLE" in table
    assert "| fVLM (arXiv 2501.14548) | 0.778 | 0.751 | 0.718 |" in table
    assert "| OKA-CT (paper not identified) | 0.849 | - | - |" in table
    assert table == (finished_run / "zero_shot" / "table.md").read_text()
    predictions = pd.read_csv(tmp_path / "predictions.csv", dtype={"study_id": str}).set_index("study_id")
    truth = pd.read_csv(cohort / "ct.csv", dtype={"study_id": str}).drop_duplicates("study_id").set_index("study_id")
    truth = truth.loc[predictions.index]
    for name, own in metrics["findings"].items():
        if truth[f"label:{name}"].nunique() == 2:
            wanted = roc_auc_score(truth[f"label:{name}"], predictions[name])
            assert own["auroc"]["value"] == pytest.approx(wanted, abs=2e-2)  # six decimals in the table make ties
        if own["threshold"] is not None:
            called = predictions[name].round(6) >= round(own["threshold"], 6)
            right = (called == (truth[f"label:{name}"] == 1)).mean()
            assert own["accuracy"]["value"] == pytest.approx(right, abs=0.15)
    table = pd.read_csv(tmp_path / "retrieval.csv", dtype={"study_id": str, "nearest_study_id": str})
    assert set(table["study_id"]) == set(predictions.index)
    forth = table[table["direction"] == "report_to_volume"]
    recall = metrics["retrieval"]["report_to_volume"]
    assert recall["recall_at_1"]["value"] == pytest.approx((forth["rank"] == 1).mean())
    assert recall["median_rank"]["value"] == forth["rank"].median()
    assert ((forth["strict_rank"] == 1) == (forth["nearest_study_id"] == forth["study_id"])).all()


@pytest.mark.full
def test_shuffled_test_labels_leave_the_thresholds_and_shuffled_val_labels_do_not(
    finished_run: Path, cohort: Path, tmp_path: Path
) -> None:
    def flip(split: str) -> Any:
        def edit(frame: pd.DataFrame) -> None:
            for name in [name for name in frame.columns if name.startswith("label:")]:
                rows = frame["split"] == split
                frame.loc[rows, name] = np.where(frame.loc[rows, name].astype(float) == 1, "0", "1")

        return edit

    plain = ask(finished_run, cohort / "ct.csv", "--out", tmp_path / "plain")
    test = relabelled(cohort, tmp_path / "test.csv", edit=flip("test"))
    val = relabelled(cohort, tmp_path / "val.csv", edit=flip("val"))
    flipped = ask(finished_run, test, "--out", tmp_path / "a")
    other = ask(finished_run, val, "--out", tmp_path / "b")

    def thresholds(metrics: dict[str, Any]) -> list[Any]:
        return [own["threshold"] for own in metrics["findings"].values()]

    assert any(value is not None for value in thresholds(plain))
    assert thresholds(flipped) == thresholds(plain)
    assert flipped["macro_auroc"] != plain["macro_auroc"]
    assert thresholds(other) != thresholds(plain)


@pytest.mark.full
@pytest.mark.parametrize("protocol", ["ct-rate-18", "fvlm-16"])
def test_a_protocol_asks_its_labels_and_scores_those_with_a_column(
    finished_run: Path, cohort: Path, tmp_path: Path, protocol: str
) -> None:
    metrics = ask(finished_run, cohort / "ct.csv", "--protocol", protocol, "--out", tmp_path)
    names = list(PROTOCOLS[protocol])
    assert list(pd.read_csv(tmp_path / "predictions.csv").columns) == ["study_id", *names]
    assert "Medical material" not in metrics["findings"]  # the phantoms have no such label
    assert ("Lymphadenopathy" in metrics["findings"]) is (protocol == "ct-rate-18")
    assert sorted([*metrics["findings"], *metrics["not_scored"]]) == sorted(names)


@pytest.mark.full
def test_without_labels_and_without_training_rows_a_vocabulary_file_is_asked(
    finished_run: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(frame: pd.DataFrame) -> None:
        frame.drop(columns=[name for name in frame.columns if name.startswith("label:")], inplace=True)
        frame.drop(index=frame.index[frame["split"] != "test"], inplace=True)

    manifest = relabelled(cohort, tmp_path / "bare.csv", edit=edit)
    words = tmp_path / "words.yaml"
    words.write_text("findings: {lung nodule: {synonyms: [round shadow]}, scar: }\n")
    assert main(["evaluate", str(finished_run), str(manifest), "--split", "val", "--out", str(tmp_path / "no")]) == 2
    assert "no row has split `val`" in capsys.readouterr().err
    metrics = ask(finished_run / "align" / "artefact", manifest, "--vocabulary", words, "--out", tmp_path / "out")
    assert metrics["macro_auroc"] is None
    assert metrics["asked"] == ["lung nodule", "scar"]
    assert metrics["retrieval"]["studies"] == metrics["studies"]
    assert list(pd.read_csv(tmp_path / "out" / "predictions.csv").columns) == ["study_id", "lung nodule", "scar"]
    assert "predictions and retrieval only" in capsys.readouterr().out
    other = tmp_path / "other.yaml"
    other.write_text("findings: {lung nodule: {synonyms: [large bright heart]}, scar: }\n")
    ask(finished_run, manifest, "--vocabulary", other, "--out", tmp_path / "again")
    first, second = (pd.read_csv(tmp_path / folder / "predictions.csv") for folder in ("out", "again"))
    assert first["scar"].tolist() == second["scar"].tolist()
    assert first["lung nodule"].tolist() != second["lung nodule"].tolist()


@pytest.mark.full
def test_bad_input_is_named(
    finished_run: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([tmp_path, cohort / "ct.csv"], "holds no stage-3 artefact"),
        ([finished_run], "MANIFEST requires an argument"),
        ([finished_run, tmp_path / "none.csv"], "no such manifest"),
        ([finished_run, cohort / "ct.csv", "--out", finished_run / "zero_shot"], "is the folder of a stage"),
        ([finished_run, cohort / "ct.csv", "--out", tmp_path, "--templates", "odd"], "unknown templates 'odd'"),
        ([finished_run, cohort / "ct.csv", "--out", tmp_path, "--vocabulary", "odd"], "unknown vocabulary 'odd'"),
    ):
        assert main(["evaluate", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
