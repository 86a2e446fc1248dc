"""Corrected false negatives on the run page: which pairs, in which words, and without a record of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ctx_distill.reporting import build_page
from ctx_distill.reporting.corrections_section import corrections
from ctx_distill.runs.run_reader import gather

HEADER = ("study_id,other_study_id,kept_as,evidence,strength,report,suspected_batches,corrected_batches,suspected_epochs,"
          "corrected_epochs,first_epoch,last_epoch,labels_known,labels_differ")  # fmt: skip
ROWS = (
    "ct000,ct001,strongest,report,0.900000,0.980000,5,4,3,2,0,4,6,0",
    "ct001,ct002,strongest,report,0.800000,0.960000,3,3,1,1,2,2,6,0",  # ct001 is shown already
    "ct002,ct003,strongest+contradicted,report,0.700000,0.940000,1,1,1,1,1,1,6,2",
    "ct004,ct005,borderline,report,0.100000,0.820000,2,1,2,1,1,3,0,0",
    "ct000,ct005,strongest,report,0.990000,0.990000,2,0,2,0,0,1,6,0",  # never corrected
)


def with_record(run: Path, rows: tuple[str, ...] = ROWS) -> Path:
    """Every training report differs, so that none is left out as the same words."""
    manifest = Path(json.loads((run / "run.json").read_text())["ct"]["path"])
    copy = run / "ct_data" / "ct.csv"
    copy.parent.mkdir()
    (copy.parent / "ct").symlink_to(manifest.parent / "ct")
    frame = pd.read_csv(manifest)
    frame["findings"] = [f"Study {n} <b>of</b> the chest. The heart is of normal size." for n in range(len(frame))]
    frame.to_csv(copy, index=False)
    info = json.loads((run / "run.json").read_text())
    info["ct"]["path"] = str(copy)
    (run / "run.json").write_text(json.dumps(info))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["alignment"] |= {"thresholds": {"report": 0.8}, "pairs": {"suspected": 1234, "corrected": 999}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "align" / "corrected.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    log = run / "align" / "logs" / "metrics.csv"
    curves = pd.read_csv(log)
    last = curves.groupby("epoch").tail(1).index
    curves.loc[last, "train/suspected_pairs"], curves.loc[last, "train/corrected_pairs"] = 40.0, 30.0
    curves.loc[last, "train/false_negative_precision"] = 0.75
    curves.to_csv(log, index=False)
    return run


def test_pairs_are_chosen_by_the_rule_and_told_in_words(make_run: Callable[..., Path]) -> None:
    run = with_record(make_run())
    shown = corrections(gather(run))
    assert shown is not None
    assert [pair.title for pair in shown.pairs] == ["ct000 and ct001", "ct004 and ct005", "ct002 and ct003"]
    first, weak, wrong = shown.pairs
    assert first.evidence == (
        "similarity of the reports: 0.98 (cosine of the frozen expert's embeddings; threshold 0.80)",
    )  # fmt: skip
    assert first.counts == "Suspected in 5 batches from epoch 0 to 4, corrected in 4 batches."
    assert first.labels == "The labels agree on all 6 findings that are labelled in both."
    assert not first.wrong
    assert weak.labels == "No finding is labelled in both studies."
    assert wrong.wrong
    assert wrong.labels.startswith("The labels differ on 2 of 6")
    assert wrong.counts == "Suspected in 1 batch in epoch 1, corrected in 1 batch."
    marked = [words for words, both in first.sides[0].report if both]
    assert len(marked) == 1
    assert "the chest. The heart is of normal size." in marked[0]
    assert "Study" not in marked[0]
    assert len(shown.epochs) == 8  # of 12
    assert shown.epochs[0] == ("0", "40", "30", "0.750")
    html = build_page(run).read_text()
    assert html.count('class="study pair"') == 3
    assert "wrong correction" in html
    assert "1,234 suspected and 999 corrected" in html
    assert "&lt;b&gt;of" in html
    assert "<b>of" not in html


def test_a_run_without_the_record_says_so_or_says_nothing(make_run: Callable[..., Path]) -> None:
    run = make_run()
    assert corrections(gather(run)) is None  # no robust evidence: no counts in the curves either
    assert 'id="corrections"' not in build_page(run).read_text()
    with_record(run)
    (run / "align" / "corrected.csv").unlink()
    assert "older than align/corrected.csv" in build_page(run).read_text()
    (run / "align" / "corrected.csv").write_text("study_id,other_study_id\nct000,ct001\n")
    assert "corrected.csv was left out: it lacks the column kept_as" in build_page(run).read_text()
    (run / "align" / "corrected.csv").write_text(HEADER + "\n")  # nothing was suspected
    assert "lists 0 pairs" in build_page(run).read_text()
