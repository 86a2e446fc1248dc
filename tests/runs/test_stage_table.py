"""Layers, overrides and keys of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctx_distill.errors import InputError
from ctx_distill.runs.stage_table import STAGES, load_preset, merge, override_for, request_key, stage_config


def test_mappings_merge_and_lists_replace() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge(base, {"a": {"y": [3]}, "c": 2}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": 2}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_another_class_drops_the_arguments_of_the_first() -> None:
    base = {"encoder": {"class_path": "A", "init_args": {"width": 3}}}
    assert merge(base, {"encoder": {"class_path": "A", "init_args": {"depth": 1}}})["encoder"]["init_args"] == {
        "width": 3,
        "depth": 1,
    }
    assert "init_args" not in merge(base, {"encoder": {"class_path": "B"}})["encoder"]


def test_overrides_go_to_the_stage_that_they_name() -> None:
    given = ["--trainer.max_epochs=3", "--distill.trainer.max_epochs", "5", "--align.model.init_args.chunk=2"]
    assert override_for(STAGES["distill"], given) == ["--trainer.max_epochs=3", "--trainer.max_epochs", "5"]
    assert override_for(STAGES["align"], given) == ["--trainer.max_epochs=3", "--model.init_args.chunk=2"]
    assert override_for(STAGES["index"], given) == ["--trainer.max_epochs=3"]
    assert override_for(STAGES["zero-shot"], ["--zero-shot.model.init_args.templates=default"]) == [
        "--model.init_args.templates=default"
    ]


@pytest.mark.parametrize("preset", ["demo", "base", "large"])
@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_every_stage_has_model_and_data_under_every_preset(preset: str, stage: object) -> None:
    config = stage_config(stage, preset)  # type: ignore[arg-type]
    assert config["model"]["class_path"].startswith("ctx_distill.stages.")
    assert config["data"]["class_path"].startswith("ctx_distill.data.loading.datamodules.")


def test_an_unknown_section_of_a_preset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("destill: {trainer: {max_epochs: 1}}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: unknown section 'destill'.*distill"):
        load_preset(str(path))


def test_an_unknown_preset_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"huge\.yaml: no such configuration layer.*base, demo, large"):
        load_preset("huge")


def test_the_key_follows_every_input() -> None:
    base = request_key({"a": 1}, ["--x=1"], {"ct": "f"}, "0.1")
    assert base == request_key({"a": 1}, ["--x=1"], {"ct": "f"}, "0.1")
    others = [
        request_key({"a": 2}, ["--x=1"], {"ct": "f"}, "0.1"),
        request_key({"a": 1}, ["--x=2"], {"ct": "f"}, "0.1"),
        request_key({"a": 1}, ["--x=1"], {"ct": "g"}, "0.1"),
        request_key({"a": 1}, ["--x=1"], {"ct": "f"}, "0.2"),
    ]
    assert len({base, *others}) == 5


def test_where_features_are_kept_is_no_part_of_the_key() -> None:
    def key(arguments: dict[str, object], overrides: list[str]) -> str:
        return request_key({"model": {"class_path": "A", "init_args": arguments}}, overrides, {}, "0.1")

    plain = key({"beams": 1}, ["--trainer.max_epochs", "3"])
    config: dict[str, object] = {"beams": 1, "cache": {"disk_gb": 5.0}, "cache_gb": 2.0}
    overrides = [
        "--model.init_args.cache.disk_gb=0", "--trainer.max_epochs", "3", "--model.cache.memory_gb", "1",
        "--model.init_args.cache", "{memory_gb: 0}", "--model.init_args.cache_gb=0.5",
    ]  # fmt: skip
    assert key(config, overrides) == plain
    assert config["cache"] == {"disk_gb": 5.0}
    assert key({"beams": 2, "cache": None}, ["--trainer.max_epochs", "3"]) != plain
    assert key({"beams": 1}, ["--trainer.max_epochs", "3", "--model.init_args.cached=1"]) != plain
    assert key({"beams": 1}, ["--trainer.max_epochs", "3", "--data.init_args.cache_gb=1"]) != plain
