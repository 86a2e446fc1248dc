"""The list of settings agrees with the classes that LightningCLI builds."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from ctx_distill.errors import InputError
from ctx_distill.runs.source_schema import ClassSource, find_class, first_sentence, signature
from ctx_distill.runs.stage_settings import TRAINER, Setting, settings_markdown, settings_of, settings_page, stage_named
from ctx_distill.runs.stage_table import STAGES, Stage, stage_config

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def by_path(stage: str, preset: str = "demo") -> dict[str, Setting]:
    return {item.path: item for item in settings_of(STAGES[stage], preset)}


def classes(stage: Stage) -> list[str]:
    config = stage_config(stage, "demo")
    return [config["model"]["class_path"], config["data"]["class_path"]]


PATHS = sorted({path for stage in STAGES.values() for path in classes(stage)} | {TRAINER, "torch.optim.AdamW"})


@pytest.mark.parametrize("path", PATHS)
def test_the_parameters_are_those_of_the_class_itself(path: str) -> None:
    source = find_class(path)
    assert source is not None
    module, _, name = path.rpartition(".")
    actual = inspect.signature(inspect.unwrap(getattr(importlib.import_module(module), name).__init__)).parameters
    found = signature(source)
    assert list(found.parameters) == [item for item in actual if item != "self"]
    assert found.complete


def test_the_fields_of_a_settings_class_are_found_through_imports() -> None:
    settings = by_path("align")
    mode = settings["model.init_args.robust.mode"]
    assert mode.kind.choices == ("relabel", "mask", "soft")
    assert mode.default == "mask"
    assert settings["model.init_args.robust.evidence"].kind.items == ("report", "findings", "retrieved", "ema")
    assert settings["model.init_args.chunk"].default == "null"
    assert settings["data.init_args.batch_size"].default == "16"
    assert settings["trainer.max_epochs"].default == "25"
    assert by_path("align", "base")["trainer.max_epochs"].default == "20"
    assert by_path("distill")["model.init_args.encoder.init_args.variant"].default == "small"


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
@pytest.mark.parametrize("preset", ["demo", "base", "large"])
def test_every_setting_is_explained_and_listed_once(stage: Stage, preset: str) -> None:
    settings = settings_of(stage, preset)
    assert not [item.path for item in settings if not item.doc]
    assert len({item.path for item in settings}) == len(settings)


def test_a_reference_to_the_base_class_is_resolved() -> None:
    doc = by_path("align")["model.init_args.warmup"].doc
    assert doc
    assert "TrainedTask" not in doc


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run `make settings`"


def test_a_cell_of_the_table_holds_no_bare_pipe() -> None:
    for line in settings_markdown(list(STAGES.values()), "demo").splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5, line


def test_an_unknown_stage_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InputError, match="unknown stage 'aling'; choose from: expert, index"):
        stage_named("aling")


def test_classes_of_one_module_are_told_apart() -> None:
    base = "ctx_distill.models.ct_encoder"
    first, second = find_class(f"{base}.ResNet3D"), find_class(f"{base}.ViT3D")
    assert isinstance(first, ClassSource)
    assert first != second
    assert find_class(f"{base}.Missing") is None


def test_the_first_sentence_ends_at_a_full_stop() -> None:
    assert (
        first_sentence("share of steps (He et al. 2016), 0.5. More.\n  text") == "Share of steps (He et al. 2016), 0.5."
    )
    assert first_sentence("") == ""
