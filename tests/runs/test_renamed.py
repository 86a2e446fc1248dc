"""Class paths of version 0.1 in a user's file are answered with their new names, and the new names exist."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from ctx_distill.errors import InputError
from ctx_distill.runs.renamed import RENAMED
from ctx_distill.runs.stage_table import read_layer


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_an_old_name_is_refused_with_the_new_one(old: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"trainer:\n  callbacks:\n    - class_path: {old}\nmodel: {{init_args: {{lr: 1}}}}\n")
    with pytest.raises(InputError, match=rf"mine\.yaml.*{old}.*write {RENAMED[old]} instead"):
        read_layer(path)


@pytest.mark.parametrize("new", sorted(RENAMED.values()))
def test_the_new_name_exists(new: str) -> None:
    module, _, name = new.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)
