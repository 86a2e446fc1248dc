"""What all builders share."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from ctx_distill.commands.main import main
from ctx_distill.commands.manifest import Source
from ctx_distill.sources.build_manifest import BUILDERS
from ctx_distill.sources.rows import Built, ManifestRow, hashed_split, one_split_per_patient

RECIPES = Path(__file__).parents[2] / "data_manifests"


def test_the_command_offers_every_builder_and_each_has_a_recipe() -> None:
    assert set(get_args(Source)) == {*BUILDERS, "dicom"}
    for name in get_args(Source):
        text = (RECIPES / f"{name}.md").read_text()
        assert f"ctx-distill manifest {name} " in text
        for word in ("Licence", "Cite", "Counts", "Known faults"):
            assert word in text, (name, word)


def test_splits_depend_on_the_patient_alone_and_keep_their_shares() -> None:
    names = [hashed_split("x", f"p{n}", 0.2, 0.1) for n in range(20_000)]
    assert names == [hashed_split("x", f"p{n}", 0.2, 0.1) for n in range(20_000)]
    for split, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        assert abs(names.count(split) / len(names) - share) < 0.01
    assert names != [hashed_split("y", f"p{n}", 0.2, 0.1) for n in range(20_000)]
    # a patient moves from train to val, never between val and test, when val grows
    more = [hashed_split("x", f"p{n}", 0.3, 0.1) for n in range(20_000)]
    assert {(a, b) for a, b in zip(names, more, strict=True) if a != b} == {("train", "val")}


def test_a_patient_of_several_splits_goes_to_the_last() -> None:
    built = Built("x", Path())
    for patient, split in (("a", "train"), ("a", "val"), ("b", "val"), ("b", "test"), ("b", "train"), ("c", "train")):
        built.rows.append(ManifestRow(f"s{len(built.rows)}", patient, split, Path("x"), f"i{len(built.rows)}"))
    one_split_per_patient(built)
    assert [(row.patient_id, row.split) for row in built.rows] == [
        ("a", "val"), ("a", "val"), ("b", "test"), ("b", "test"), ("b", "test"), ("c", "train"),
    ]  # fmt: skip
    assert built.notes[0].startswith("2 patients were in several splits; 3 of their images")


@pytest.mark.parametrize("shares", [["--val", "1"], ["--val", "0.6", "--test", "0.5"], ["--test", "-0.1"]])
def test_shares_that_leave_no_train(tmp_path: Path, shares: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "padchest", str(tmp_path), str(tmp_path / "x.csv"), *shares]) == 2
    assert "expected non-negative shares" in capsys.readouterr().err
    assert main(["manifest", "padchest", str(tmp_path / "none"), str(tmp_path / "x.csv")]) == 2
    assert "no such folder" in capsys.readouterr().err
