"""The result table of a run."""

from __future__ import annotations

from ctx_distill.pipeline.table import result_table


def test_values_intervals_and_chance_stand_in_their_row_and_undefined_ones_are_left_out() -> None:
    metrics = {
        "retrieval": {"jaccard_at_1": {"value": 0.3304, "low": 0.28, "high": 0.376}, "jaccard_random": 0.139},
        "zero_shot": {"macro_auroc": None},
        "report": {"bleu4": 0.158, "findings_f1": {"value": None, "low": None, "high": None}},
    }
    lines = result_table(metrics).splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["1", "4"]
    assert "0.330 [0.280, 0.376]" in lines[3]
    assert lines[3].endswith("0.139")
    assert "0.158" in lines[4]
