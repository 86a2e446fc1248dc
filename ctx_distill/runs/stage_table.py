"""The stages of a run: what each reads, and its configuration layers.

Nothing heavy is imported here, so that `ctx-distill all` finds out within two seconds that everything is complete.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctx_distill.errors import InputError
from ctx_distill.files import hash_file, hash_json, restore_folder
from ctx_distill.runs.renamed import refuse_renamed


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: the command, and its section in a preset.
        folder: its folder in the run folder.
        title: the name in messages.
        config: its YAML layer in `stages/`.
        reads: the manifests that it reads ("ct", "xray").
        group: a preset section that it shares with other stages.
        needs: for each artefact, the model argument that takes it and the stage that makes it.
        metrics_key: its key in `RUN/metrics.json`.
        summary: what its command does, for help.
        heading: its name on pages.
        number: its number in the method; None for the expert, which may be pretrained.
    """

    name: str
    folder: str
    title: str
    config: str
    reads: tuple[str, ...]
    group: str
    needs: tuple[tuple[str, str], ...]
    metrics_key: str
    summary: str
    heading: str
    number: int | None = None

    @property
    def table_name(self) -> str:
        """Its name in printed tables: number and metrics key."""
        return self.title if self.number is None else f"{self.number} {self.metrics_key.replace('_', '-')}"


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "expert", "expert", "X-ray expert", "0_expert.yaml", ("ct", "xray"), "xray", (), "expert",
            "Train a small X-ray expert, if there is no pretrained one.", "X-ray expert",
        ),
        Stage(
            "index", "index", "X-ray index", "1_index.yaml", ("ct", "xray"), "xray", (("expert", "expert"),), "retrieval",
            "embed the X-ray pool and build the FAISS index.", "Retrieval index", 1,
        ),
        Stage(
            "distill", "distill", "distillation", "2_distill.yaml", ("ct",), "ct",
            (("expert", "expert"), ("index", "index")), "distillation",
            "distil the X-ray expert into the CT encoder.", "Distillation", 2,
        ),
        Stage(
            "align", "align", "robust contrastive alignment", "3_align.yaml", ("ct",), "ct",
            (("expert", "expert"), ("index", "index"), ("student", "distill")), "alignment",
            "align CTs and reports, and correct false negatives.", "Robust alignment", 3,
        ),
        Stage(
            "zero-shot", "zero_shot", "zero-shot findings", "4_zero_shot.yaml", ("ct",), "ct", (("model", "align"),),
            "zero_shot", "score findings with prompts, without labels.", "Zero-shot", 4,
        ),
        Stage(
            "classifier", "classifier", "classifier", "4_classifier.yaml", ("ct",), "ct", (("model", "align"),),
            "classifier", "train a supervised classifier of findings.", "Classifier", 4,
        ),
        Stage(
            "report", "report", "report decoder", "4_report.yaml", ("ct",), "ct", (("model", "align"),), "report",
            "train a report decoder.", "Report decoder", 4,
        ),
    )
}  # fmt: skip
HEADS = ("zero-shot", "classifier", "report")
"""The stages of stage 4, `ctx-distill heads`."""


def stages_folder() -> Path:
    """Return the folder of the shipped YAML layers: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "_stages"
    return inside if inside.is_dir() else package.parent / "stages"


def read_layer(path: Path) -> dict[str, Any]:
    """Read one YAML layer.

    Raises:
        InputError: the file does not exist, holds no mapping, or names a class that was renamed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such configuration layer. Those that exist: {', '.join(_names(path.parent))}.")
    try:
        layer = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(layer, dict):
        raise InputError(f"{path}: holds {type(layer).__name__}, expected a mapping of settings.")
    refuse_renamed(path, layer)
    return layer


def _names(folder: Path) -> Iterable[str]:
    return sorted(path.stem for path in folder.glob("*.yaml")) or ["none"]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge one mapping into another: mappings are merged, everything else (lists too) is replaced.

    A new `class_path` drops the `init_args` of the class that it replaces.
    """
    merged = copy.deepcopy(dict(base))
    if "class_path" in over and over["class_path"] != merged.get("class_path"):
        merged.pop("init_args", None)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def load_preset(preset: str) -> dict[str, Any]:
    """Read a preset by name (`stages/presets/NAME.yaml`) or by path.

    Raises:
        InputError: unknown preset, or a section that is neither a stage nor a group of stages.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else stages_folder() / "presets" / f"{preset}.yaml"
    sections = read_layer(path)
    known = {"all"} | {stage.group for stage in STAGES.values()} | set(STAGES)
    unknown = sorted(set(sections) - known)
    if unknown:
        raise InputError(f"{path}: unknown section {unknown[0]!r}; expected one of {', '.join(sorted(known))}.")
    return sections


def stage_config(stage: Stage, preset: str) -> dict[str, Any]:
    """Merge the layers of a stage: base, the stage's layer, then the preset's `all`, group and stage sections."""
    folder = stages_folder()
    config = merge(read_layer(folder / "base.yaml"), read_layer(folder / stage.config))
    sections = load_preset(preset)
    for section in ("all", stage.group, stage.name):
        config = merge(config, sections.get(section) or {})
    return config


def override_for(stage: Stage, arguments: Iterable[str]) -> list[str]:
    """Return the overrides that apply to a stage.

    `--distill.trainer.max_epochs=2` applies to one stage and is returned without the prefix. An override without a
    stage's prefix applies to every stage that the command runs.
    """
    chosen: list[str] = []
    taken = True
    for argument in arguments:
        if argument.startswith("-"):
            prefix = argument.removeprefix("--").partition(".")[0]
            taken = prefix not in STAGES or prefix == stage.name
            if prefix == stage.name:
                argument = "--" + argument.removeprefix(f"--{prefix}.")
        if taken:
            chosen.append(argument)
    return chosen


def source_fingerprint(source: str | Path) -> str:
    """Return the fingerprint of an artefact's or an expert's folder, from its files; a hub name is returned unchanged."""
    folder = Path(source)
    restore_folder(folder)
    if not folder.is_dir():
        return str(source)
    files = sorted(path for pattern in ("*.json", "*.safetensors", "*.bin") for path in folder.glob(pattern))
    return hash_json({path.name: hash_file(path) for path in files})


WITHOUT_EFFECT = ("cache", "cache_gb")
"""Arguments of a stage's model that change only where features are kept (`training/row_features.py`), no result."""


def request_key(config: Mapping[str, Any], overrides: list[str], inputs: Mapping[str, str], version: str) -> str:
    """Return the key of a request: a finished stage with an equal key is not rerun.

    Settings that change no result (`WITHOUT_EFFECT`) are excluded, in the layers and in the overrides.
    """
    counted = copy.deepcopy(dict(config))
    model = counted.get("model")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    if isinstance(arguments, dict):
        for name in WITHOUT_EFFECT:
            arguments.pop(name, None)
    key = {"config": counted, "overrides": list(_with_effect(overrides)), "inputs": dict(inputs), "version": version}
    return hash_json(key)


def _with_effect(overrides: Iterable[str]) -> Iterator[str]:
    """Yield the overrides except those of `WITHOUT_EFFECT`, given as `--name=value` or as `--name value`."""
    counts = True
    for argument in overrides:
        if argument.startswith("--"):
            path = argument.removeprefix("--").partition("=")[0].split(".")
            name = [part for part in path if part != "init_args"][:2]
            counts = not (len(name) == 2 and name[0] == "model" and name[1] in WITHOUT_EFFECT)
        if counts:
            yield argument
