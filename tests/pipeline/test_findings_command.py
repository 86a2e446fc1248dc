"""`ctx-distill findings`: the table that it writes, what it refuses, and the floor on real labelled reports."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from ctx_distill.cli import main

REPORTS = Path(__file__).parents[3] / "shared/data/reports/ct_reports_18_labels.csv"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_keeps_its_columns_and_gains_the_findings(tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(
        'id,findings,impression,note\n007,"Left pleural effusion.\nNo pneumothorax.",Possible pneumonia.,"a, b"\n8,,,\n'
    )
    assert main(["findings", str(source), str(out), "--vocabulary", "chexpert", "--sides"]) == 0
    first, second = rows(out)
    assert (first["id"], first["note"], first["findings"]) == (
        "007",
        "a, b",
        "Left pleural effusion.\nNo pneumothorax.",
    )
    told = [first[name] for name in ("Pleural Effusion", "Pneumothorax", "Pneumonia", "Fracture")]
    assert told == ["1", "0", "-1", ""]
    assert (first["side:Pleural Effusion"], first["side:Pneumothorax"]) == ("left", "")
    assert set(list(second.values())[4:]) == {""}
    parquet, again = tmp_path / "out.parquet", tmp_path / "again.csv"
    assert main(["findings", str(source), str(parquet), "--vocabulary", "chexpert", "--sides"]) == 0
    assert (
        main(["findings", str(parquet), str(again), "--vocabulary", "chexpert", "--prefix", "x:", "--workers", "1"])
        == 0
    )
    assert rows(again)[0]["x:Pleural Effusion"] == "1"


@pytest.mark.full
def test_processes_read_what_one_does_in_the_same_order(tmp_path: Path) -> None:
    source, one, two = (tmp_path / name for name in ("in.csv", "1.csv", "2.csv"))
    draw = random.Random(0)
    said = ["No effusion.", "Left effusion.", "A nodule.", "Possible atelectasis."]
    source.write_text("report_text\n" + "".join(f"{' '.join(draw.choices(said, k=3))}\n" for _ in range(4500)))
    for out, workers in ((one, "1"), (two, "2")):
        assert main(["findings", str(source), str(out), "--workers", workers]) == 0
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"id,text\n1,a\n", [], "report_text"),
        (b"report_text\n\xe9panchement\n", [], "UTF-8"),
        (b"report_text,Cardiomegaly\na,1\n", [], "--prefix"),
        (b"report_text\na\n", ["--vocabulary", "nothing"], "ct-rate"),
    ],
)
def test_bad_input_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, arguments: list[str], message: str
) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(content)
    assert main(["findings", str(source), str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_the_source_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.csv"
    source.write_text("report_text\nA nodule.\n")
    assert main(["findings", str(source), str(source)]) == 2
    assert main(["findings", str(source), str(tmp_path / "out.xlsx")]) == 2
    assert "another file" in capsys.readouterr().err
    assert source.read_text() == "report_text\nA nodule.\n"


@pytest.mark.slow
@pytest.mark.skipif(not REPORTS.is_file(), reason="the real labelled reports are not here")
def test_the_floor_on_real_labelled_reports(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert main(["findings", str(REPORTS), str(out), "--prefix", "found:"]) == 0
    table = rows(out)
    names = [name.removeprefix("found:") for name in table[0] if name.startswith("found:")]
    true = np.array([[float(row[name]) == 1 for name in names] for row in table])
    said = np.array([[row[f"found:{name}"] == "1" for name in names] for row in table])
    first = {row["report_text"].strip() for row in table[:600]}
    rest = [i for i in range(600, len(table)) if table[i]["report_text"].strip() not in first]
    assert f1_score(true[rest], said[rest], average="macro") >= 0.90
    assert f1_score(true[:600], said[:600], average=None).min() >= 0.85
