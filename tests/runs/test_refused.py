"""A request that fails before training began leaves the run as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctx_distill.commands.main import main
from ctx_distill.runs import lightning_cli
from ctx_distill.runs.run_folder import open_stage
from ctx_distill.runs.runner import StageRequest, run_stage
from ctx_distill.runs.stage_table import STAGES


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for kind in ("ct", "xray"):
        (folder / f"{kind}.csv").write_text("study_id\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a finished expert."""
    folder = tmp_path / "run" / "expert"
    open_stage(folder, "finished", {})
    (folder / "metrics.json").write_text("{}")
    return folder.parent


def content(run: Path) -> dict[str, str]:
    """The files of a run, without its lock."""
    files = (path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {path.relative_to(run).as_posix(): path.read_text() for path in files}


def request(data: Path, run: Path, *overrides: str) -> StageRequest:
    return StageRequest(STAGES["expert"], data, run, "demo", list(overrides))


@pytest.mark.parametrize("error", [SystemExit(2), RuntimeError("no GPU"), KeyboardInterrupt(), OSError("disk")])
@pytest.mark.parametrize("force", [False, True])
def test_a_request_that_cannot_be_built_restores_the_former_result(
    error: BaseException, force: bool, data: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(arguments: list[str]) -> None:
        raise error

    before = content(run)
    monkeypatch.setattr(lightning_cli, "build", refuse)
    for _ in range(3):
        with pytest.raises(type(error)):
            run_stage(request(data, run), force=force)
        assert content(run) == before
        assert [path.name for path in run.iterdir() if path.is_dir()] == ["expert"]


def test_a_forced_rerun_that_fails_leaves_the_stage_complete(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(data, tmp_path / "run")
    open_stage(asked.folder, asked.key, {})
    (asked.folder / "metrics.json").write_text("{}")

    def refuse(arguments: list[str]) -> None:
        raise SystemExit(2)

    monkeypatch.setattr(lightning_cli, "build", refuse)
    with pytest.raises(SystemExit):
        run_stage(asked, force=True)
    assert asked.complete


@pytest.mark.parametrize("began", [None, "fit"])
def test_work_to_resume_from_is_kept(began: str | None, data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash after the trainer started keeps the new folder; before that the former result is restored."""

    class Parser:
        def save(self, *arguments: Any, **options: Any) -> None:
            pass

    cli = SimpleNamespace(parser=Parser(), config={}, trainer=SimpleNamespace(state=SimpleNamespace(fn=began)))

    def crash(cli: Any, folder: Path) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lightning_cli, "build", lambda arguments: cli)
    monkeypatch.setattr(lightning_cli, "run_task", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_stage(request(data, run))
    restored = json.loads((run / "expert" / "request.json").read_text())["key"] == "finished"
    assert restored is (began is None)
    assert (run / "expert.before-1").exists() is (began is not None)


def test_a_bad_override_touches_nothing(data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(run)
    arguments = ["expert", "--data", str(data), "--run", str(run), "--model.init_args.vision=resnt"]
    assert main(arguments) == 2
    assert "choose from: regnet, resnet, vit, resnet50 (did you mean 'resnet'?)" in capsys.readouterr().err
    assert content(run) == before
    assert not (run / ".lock").exists()
    assert main([*arguments[:-2], str(run.parent / "new"), arguments[-1]]) == 2
    assert not (run.parent / "new").exists()


def test_a_value_that_only_the_parser_refuses_is_one_line(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    assert main(["expert", "--data", str(data), "--run", str(run), "--trainer.logger=Foo"]) == 2
    error = capsys.readouterr().err
    assert "trainer.logger" in error
    assert len(error.splitlines()) == 1
    assert content(run) == before


def test_numbers_of_former_results_are_not_used_twice(tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    for key in ("a", "b", "c"):
        open_stage(folder, key, {})
    (tmp_path / "expert.before-1" / "request.json").unlink()
    (tmp_path / "expert.before-1").rmdir()
    former = open_stage(folder, "d", {})
    assert former is not None
    assert former.name == "expert.before-3"
