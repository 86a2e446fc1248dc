"""`ctx-distill settings`."""

from __future__ import annotations

import pytest

from ctx_distill.commands.main import main


def test_the_settings_of_a_stage_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "align"]) == 0
    text = capsys.readouterr().out
    assert "--model.init_args.robust.mode=mask\n      relabel, mask, soft\n" in text
    assert "--trainer.max_epochs=25\n" in text
    assert main(["settings", "align", "base"]) == 0
    assert "--trainer.max_epochs=20\n" in capsys.readouterr().out


def test_markdown_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "align", "--markdown"]) == 0
    assert "| `model.init_args.robust.mode` | `mask` | `relabel`, `mask`, `soft` |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["aling"], ["align", "dmeo"]])
def test_an_unknown_stage_or_preset_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
