"""Labels that reports contradict, by hand-made contradictions in a run's manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ctx_distill.reporting.label_text_section import contradicted
from ctx_distill.reporting.run_page import build_page
from ctx_distill.runs.run_reader import gather


def test_a_flipped_label_is_listed_and_an_honest_cohort_has_none(make_run: Callable[..., Path]) -> None:
    run = make_run()
    manifest = pd.read_csv(gather(run).ct.path)  # type: ignore[union-attr]
    assert contradicted(gather(run)) == []
    build_page(run)
    assert "contradicts" not in (run / "index.html").read_text().split('id="failed"')[1].split("</section>")[0].replace(
        "no report contradicts its labels", ""
    )

    data = run / "data"
    data.mkdir()
    absent = manifest[(manifest["split"] == "test") & (manifest["label:cardiomegaly"] == 0)].index[0]
    present = manifest[(manifest["split"] == "test") & (manifest["label:cardiomegaly"] == 1)].index[0]
    manifest.loc[absent, "findings"] = "The heart is enlarged."
    manifest.loc[present, ["findings", "impression"]] = ["No cardiomegaly.", "Normal chest."]
    manifest.loc[manifest["split"] == "train", "label:cardiomegaly"] = 1  # not of the test studies
    manifest.to_csv(data / "ct.csv", index=False)
    info = (run / "run.json").read_text().replace(str(gather(run).ct.path), str(data / "ct.csv"))  # type: ignore[union-attr]
    (run / "run.json").write_text(info)
    (found,) = contradicted(gather(run))
    assert set(found.details) == {
        f"{manifest.at[absent, 'study_id']}: cardiomegaly labelled absent, the report asserts it",
        f"{manifest.at[present, 'study_id']}: cardiomegaly labelled present, the report denies it",
    }
    assert found.what.startswith("2 of ")


def test_without_labels_there_is_nothing_to_contradict(make_run: Callable[..., Path]) -> None:
    assert contradicted(gather(make_run(labels=False))) == []
