"""Settings that were removed are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctx_distill.errors import InputError
from ctx_distill.runs.lightning_cli import build


def test_a_removed_setting_is_named_with_what_took_its_place(tmp_path: Path) -> None:
    layers = tmp_path / "layers.yaml"
    layers.write_text("model: {init_args: {survival: {explosion: 50.0}}}\n")
    with pytest.raises(InputError, match=r"survival.explosion was removed: .*trainer.gradient_clip_val"):
        build(["--config", str(layers)])
    layers.write_text("model: {class_path: a.b}\n")
    for given in ("--model.init_args.survival.back_off=0.5", "--model.init_args.survival={back_off: 0.5}"):
        with pytest.raises(InputError, match=r"survival.back_off was removed"):
            build(["--config", str(layers), given])
