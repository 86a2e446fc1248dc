"""The settings of a stage: names, types, defaults, choices and explanations, without importing torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctx_distill.errors import InputError
from ctx_distill.runs.source_schema import REQUIRED, ClassSource, Kind, Parameter, find_class, signature
from ctx_distill.runs.stage_table import STAGES, Stage, stage_config

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
LISTED = (
    "max_epochs", "max_steps", "max_time", "accelerator", "devices", "num_nodes", "strategy", "precision",
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "check_val_every_n_epoch",
    "limit_train_batches", "limit_val_batches", "limit_predict_batches", "log_every_n_steps", "deterministic",
    "detect_anomaly", "profiler", "logger", "callbacks",
)  # fmt: skip
"""Arguments of Lightning's Trainer that `ctx-distill settings` lists; the others are accepted too."""


@dataclass(frozen=True)
class Setting:
    """One override of a stage.

    Attributes:
        path: the dotted name, such as `model.init_args.robust.mode`.
        kind: what it may be.
        default: its value with the preset, for people.
        doc: one sentence.
    """

    path: str
    kind: Kind
    default: str
    doc: str

    def allowed(self, quote: str = "") -> str:
        """Return the choices or the type, each between `quote`."""
        kind = self.kind
        named = ", ".join(f"{quote}{_shown(choice)}{quote}" for choice in kind.choices or kind.items)
        if kind.items:
            return f"list of {named}"
        if not kind.choices:
            return f"{quote}{kind.text}{quote}"
        more = [*sorted(kind.scalars), *(["null"] if kind.optional else [])]
        return ", ".join([named, *(f"{quote}{name}{quote}" for name in more)])


def stage_named(name: str) -> Stage:
    """Return a stage by name.

    Raises:
        InputError: there is no such stage.
    """
    if name not in STAGES:
        raise InputError(f"unknown stage {name!r}; choose from: {', '.join(STAGES)}")
    return STAGES[name]


def settings_of(stage: Stage, preset: str) -> list[Setting]:
    """Return every setting of a stage under a preset, in the order of the constructors.

    Args:
        stage: the stage.
        preset: name or path of the preset that the defaults are taken from.

    Raises:
        InputError: no such preset.
    """
    config = stage_config(stage, preset)
    found: list[Setting] = []
    for section in ("model", "data"):
        source = find_class(str(config[section]["class_path"]))
        assert source is not None, config[section]
        found += _of_class(f"{section}.init_args", source, config[section].get("init_args") or {}, {})
    trainer, given = trainer_parameters(), config.get("trainer") or {}
    for name in [*LISTED, *(name for name in given if name not in LISTED)]:
        if name in trainer:
            item = trainer[name]
            found.append(Setting(f"trainer.{name}", item.kind, _shown(given.get(name, item.default)), item.doc))
    seed = "Seed of everything that is random."
    kind = Kind(scalars=frozenset({"int"}), text="int")
    return [*found, Setting("seed_everything", kind, _shown(config.get("seed_everything", 0)), seed)]


def trainer_parameters() -> Mapping[str, Parameter]:
    """Return the arguments of Lightning's Trainer."""
    source = find_class(TRAINER)
    assert source is not None, TRAINER
    return signature(source).parameters


def _of_class(
    prefix: str, source: ClassSource, given: Mapping[str, Any], defaults: Mapping[str, Any], parent: str = ""
) -> Iterator[Setting]:
    """Yield the settings of a class, and of the dataclasses and classes that its parameters hold.

    Args:
        prefix: the path in front of the names.
        source: the class.
        given: values that the configuration sets.
        defaults: values that take the place of the class's defaults.
        parent: explanation for parameters that have none.
    """
    for name, item in signature(source).parameters.items():
        default = defaults.get(name, item.default)
        value = given.get(name, default)
        path, doc = f"{prefix}.{name}", item.doc or parent
        if item.kind.dataclasses and not (item.kind.optional and value is None):
            inner = value if isinstance(value, Mapping) else {}
            own = default if isinstance(default, Mapping) else {}
            yield from _of_class(path, item.kind.dataclasses[0], inner, own, doc)
            continue
        if item.kind.dataclasses:
            yield Setting(path, item.kind, _shown(value), doc)
            yield from _of_class(path, item.kind.dataclasses[0], {}, {}, doc)
            continue
        if not isinstance(value, Mapping) or "class_path" not in value:
            yield Setting(path, item.kind, _shown(value), doc)
            continue
        yield Setting(path, item.kind, str(value["class_path"]), doc)
        chosen, arguments = find_class(str(value["class_path"])), value.get("init_args") or {}
        if chosen is not None and chosen.module.startswith("ctx_distill."):
            yield from _of_class(f"{path}.init_args", chosen, arguments, {}, doc)
        else:
            kinds = signature(chosen).parameters if chosen is not None else {}
            for argument, setting in arguments.items():
                kind = kinds[argument].kind if argument in kinds else Kind(others=True, text="any")
                explanation = f"Argument `{argument}` of {str(value['class_path']).rpartition('.')[2]}."
                yield Setting(f"{path}.init_args.{argument}", kind, _shown(setting), explanation)


def _shown(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping | list | tuple):
        text = json.dumps(value, default=str)
        return text if len(text) <= 60 else f"{len(value)} entries, see stages/base.yaml"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def settings_text(stage: Stage, preset: str) -> str:
    """Return the settings of a stage as text for a terminal: two lines per setting."""
    lines = [f"{stage.title}: overrides, with the values of preset {preset}"]
    for item in settings_of(stage, preset):
        lines += [f"--{item.path}={item.default}", f"      {item.allowed()}", f"      {item.doc}"]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def settings_markdown(stages: list[Stage], preset: str) -> str:
    """Return the settings of stages as Markdown tables."""
    lines: list[str] = []
    for stage in stages:
        lines += [f"## {stage.name}", "", f"{stage.title[0].upper()}{stage.title[1:]}.", ""]
        lines += ["| override | default | type or choices | meaning |", "| --- | --- | --- | --- |"]
        for item in settings_of(stage, preset):
            cells = (f"`{item.path}`", f"`{item.default}`", item.allowed("`"), item.doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def settings_page() -> str:
    """Return `docs/settings.md`: every setting of every stage under the preset `demo`."""
    head = """# Settings

Every override of every stage. Give one to a stage command as `--NAME=VALUE`, or to `ctx-distill all` with the stage in
front: `--align.model.init_args.robust.mode=soft`. `ctx-distill settings STAGE PRESET` prints the same list with the
defaults of another preset. All other arguments of Lightning's
[Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html) are accepted too.

The defaults are those of the preset `demo`. A name in braces, such as `{ct}`, is replaced by a path of the run.

This page is generated: `ctx-distill settings all` prints it.
"""
    return f"{head}\n{settings_markdown(list(STAGES.values()), 'demo')}"
