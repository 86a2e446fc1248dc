"""The examples of docs/use.md, run as they stand with the placeholders filled in."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from ctx_distill.commands.main import main

TEXT = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.full
def test_examples(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, "RUN")
    shutil.copytree(finished_run, "FINETUNED")
    scans = sorted(cohort.glob("ct/*.nii.gz"))
    shutil.copy(scans[0], "scan.nii.gz")
    Path("SCANS").mkdir()
    shutil.copy(scans[1], "SCANS")
    places = {"CT": str(cohort / "ct.csv"), "DATA": str(cohort), "PRESET": str(tiny_preset)}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "docs/use.md", "exec"), {})
        else:
            command, *arguments = shlex.split(block)
            assert command == "ctx-distill"
            assert main([places.get(argument, argument) for argument in arguments]) == 0, block
    for made in ("effusion.nii.gz", "OUT/probabilities.csv", "RUN/probe/few_shot.csv", "EXPORT/README.md"):
        assert Path(made).is_file(), made
    assert '"mode": "finetune"' in Path("FINETUNED/classifier/artefact/artefact.json").read_text()
