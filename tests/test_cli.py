"""The command line: what it refuses, and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctx_distill.commands.main import main


def test_an_option_that_no_command_knows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["phantom", str(tmp_path), "--colour", "red"]) == 2
    assert "--colour" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_page_of_no_run_is_refused_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--run", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_weights_that_are_not_the_pinned_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pt").write_bytes(b"not the release")
    assert main(["weights", "convert-torchxrayvision", str(tmp_path / "model.pt"), str(tmp_path / "out")]) == 2
    assert "model.pt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_nowhere_is_refused(
    cohort: Path, tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["index", "--data", str(cohort), "--run", str(tmp_path / "run"), "--preset", str(tiny_preset)]
    assert main([*given, "--expert", str(tmp_path / "no-expert")]) == 2
    assert "no-expert" in capsys.readouterr().err
