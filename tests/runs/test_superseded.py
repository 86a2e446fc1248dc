"""Superseded results are listed, and deleted on request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctx_distill.commands.main import main
from ctx_distill.errors import InputError
from ctx_distill.runs.superseded import clean_run, superseded

HOLD = """
import sys, time
from pathlib import Path
from ctx_distill.runs.run_folder import lock_run
with lock_run(Path(sys.argv[1]), "ctx-distill distill"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, size in (("distill", 5), ("distill.before-2", 2000), ("distill.before-10", 7), ("align.before-1", 0)):
        (tmp_path / name / "artefact").mkdir(parents=True)
        (tmp_path / name / "artefact" / "weights").write_bytes(b"x" * size)
        os.utime(tmp_path / name / "artefact" / "weights", (86400 * 366, 86400 * 366))
    (tmp_path / "notes.before-1").mkdir()  # not a stage
    return tmp_path


def test_superseded_results_are_listed_with_size_and_date(run: Path) -> None:
    assert [item.path.name for item in superseded(run)] == ["align.before-1", "distill.before-2", "distill.before-10"]
    lines = clean_run(run, delete=False).splitlines()
    assert lines[1].split() == ["distill.before-2", "2.0", "KB", "1971-01-02", "00:00"]
    assert lines[-1] == f"{run}: 3 superseded results, 2.0 KB; `--delete` deletes them"
    assert (run / "distill.before-2").is_dir()


def test_delete_removes_only_superseded_results(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", str(run), "--delete"]) == 0
    assert "3 superseded results, 2.0 KB; deleted" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["distill", "notes.before-1"]
    assert clean_run(run, delete=False) == f"{run}: no superseded results"


def test_a_locked_run_is_not_cleaned(run: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="in use by process"):
            clean_run(run, delete=True)
        assert len(superseded(run)) == 3
    finally:
        holder.kill()
        holder.wait()


def test_a_missing_run_is_refused_and_not_made(tmp_path: Path) -> None:
    for delete in (True, False):
        with pytest.raises(InputError, match="no such run folder"):
            clean_run(tmp_path / "none", delete=delete)
    assert not (tmp_path / "none").exists()
