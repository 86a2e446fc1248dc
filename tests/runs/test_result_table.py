"""The result table of a run."""

from __future__ import annotations

from ctx_distill.runs.result_table import result_table


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


def test_the_retrieval_stands_beside_its_baselines() -> None:
    retrieval = {"jaccard_at_1": {"value": 0.5, "low": 0.4, "high": 0.6}, "jaccard_random": 0.1, "jaccard_tfidf": 0.3,
                 "jaccard_oracle": 0.9, "recall_at_5": None, "recall_at_5_random": 0.2, "recall_at_5_tfidf": 0.25,
                 "recall_at_5_oracle": 1.0, "jaccard_at_1_visible": 0.7, "jaccard_oracle_visible": 0.95}  # fmt: skip
    lines = result_table({"retrieval": retrieval}).splitlines()[-5:]
    assert lines[0].split()[-4:] == ["index", "random", "TF-IDF", "oracle"]
    assert lines[2].endswith("0.500 [0.400, 0.600]  0.100   0.300   0.900")
    assert lines[3].split()[-4:] == ["-", "0.200", "0.250", "1.000"]
    assert "an X-ray shows" in lines[4]
    assert lines[4].split()[-4:] == ["0.700", "-", "-", "0.950"]
    assert "oracle" not in result_table({"retrieval": {"jaccard_at_1": 0.5}})


def test_generated_reports_stand_beside_their_baselines_and_the_verdict() -> None:
    report = {"findings_f1": {"value": 0.2, "low": 0.1, "high": 0.3}, "rouge_l": 0.4, "cider": None,
              "verdict": "The decoder does not beat its baselines.",
              "baselines": {"nearest": {"findings_f1": 0.5, "rouge_l": 0.6}, "frequent": {"findings_f1": 0.0}}}  # fmt: skip
    lines = result_table({"report": report}).splitlines()[-5:]
    assert lines[0].split()[-5:] == ["decoder", "nearest", "report", "frequent", "report"]
    assert lines[2].endswith("0.200 [0.100, 0.300]  0.500           0.000")
    assert lines[3].split()[-3:] == ["0.400", "0.600", "-"]
    assert lines[4] == "The decoder does not beat its baselines."
    assert "baselines" not in result_table({"report": {"bleu4": 0.1}})
