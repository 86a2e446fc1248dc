"""Validation of LightningCLI overrides, before anything on disk is touched and before torch is imported.

jsonargparse stays the judge of every value. What is checked here is what can be answered at once and in one sentence: the
names of the settings, and values of types that are enumerated or scalar.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ctx_distill.errors import InputError
from ctx_distill.runs.source_schema import SCALARS, Kind, find_class, signature
from ctx_distill.runs.stage_settings import settings_of, trainer_parameters
from ctx_distill.runs.stage_table import STAGES, Stage, override_for, stage_config
from ctx_distill.training.fault_tolerance import REMOVED

_ROOT = ("config", "print_config", "help", "seed_everything")


@dataclass(frozen=True)
class Override:
    """One override as it was given. `value` is None where none follows the name."""

    name: str
    value: str | None

    @property
    def path(self) -> list[str]:
        """The parts of the name."""
        return self.name.removesuffix("+").split(".")


def split_overrides(arguments: Iterable[str]) -> Iterator[Override]:
    """Yield the overrides of `--name=value` and `--name value`.

    Raises:
        InputError: a value without a name.
    """
    waiting: str | None = None
    for argument in arguments:
        if re.match(r"--?[A-Za-z]", argument):
            if waiting is not None:
                yield Override(waiting, None)
            name, separator, value = argument.lstrip("-").partition("=")
            waiting = None if separator else name
            if separator:
                yield Override(name, value)
        elif waiting is not None:
            yield Override(waiting, argument)
            waiting = None
        else:
            raise InputError(f"unexpected argument {argument!r}; expected overrides as --NAME=VALUE.")
    if waiting is not None:
        yield Override(waiting, None)


def check_overrides(stages: Sequence[Stage], preset: str, arguments: Sequence[str]) -> None:
    """Check the overrides of the stages that a command runs.

    Args:
        stages: the stages.
        preset: name or path of the preset.
        arguments: overrides, with or without `--STAGE.` in front.

    Raises:
        InputError: a setting that does not exist, or a value that it cannot have.
    """
    if not arguments:
        return
    refuse_removed(arguments)
    _check_prefixes(stages, arguments)
    for stage in stages:
        checker = OverrideChecker(stage, preset)
        for override in split_overrides(override_for(stage, arguments)):
            try:
                checker.check(override)
            except UnknownSettingError as error:
                raise InputError(_with_stage(error, stage, stages, preset, override)) from None


def refuse_removed(texts: Iterable[str]) -> None:
    """Refuse settings that were removed, which would otherwise be reported as unknown.

    Args:
        texts: overrides, or values of `survival` in a configuration, as text.

    Raises:
        InputError: one names such a setting; the message says what took its place.
    """
    for text in texts:
        for name, reason in REMOVED.items():
            if ".survival" in text and re.search(rf"\b{name}\b", text):
                raise InputError(f"model.init_args.survival.{name} was removed: {reason}. Remove the setting.")


class UnknownSettingError(InputError):
    """A setting that the stage does not have."""


class OverrideChecker:
    """Checks overrides against the settings of one stage, in the order in which they are given.

    The order matters: `--model.init_args.encoder=ViT3D` changes which settings the encoder has.

    Args:
        stage: the stage.
        preset: name or path of the preset.
    """

    def __init__(self, stage: Stage, preset: str) -> None:
        self.stage, self.preset = stage, preset
        self._config = stage_config(stage, preset)
        self._chosen: dict[str, str | None] = {}

    def check(self, override: Override) -> None:
        """Check one override.

        Raises:
            UnknownSettingError: there is no such setting.
            InputError: the value is missing, or the setting cannot have it.
        """
        head, *rest = override.path
        if head in _ROOT or head == "c":
            if head == "seed_everything":
                self._check_value(override, Kind(scalars=frozenset({"int", "bool"}), text="int"), override.value)
            return
        if override.value is None and override.path[-1] != "help":
            raise InputError(f"--{override.name}: has no value; expected --{override.name}=VALUE.")
        if head == "trainer":
            self._check_trainer(override, rest)
        elif head in ("model", "data"):
            if rest[-1:] != ["help"]:
                self._check_class(override, head, rest, self._config.get(head))
        else:
            raise self._unknown(override)

    def _check_trainer(self, override: Override, rest: list[str]) -> None:
        parameters = trainer_parameters()
        value = _parsed(override.value)
        for name in rest[:1] or (list(value) if isinstance(value, Mapping) else []):
            if name not in parameters:
                raise self._unknown(override, ["trainer", str(name)])
        if len(rest) == 1:
            self._check_value(override, parameters[rest[0]].kind, override.value)

    def _check_class(self, override: Override, place: str, rest: list[str], config: Any, base: str = "") -> None:
        """Check what follows the place of an object that is chosen by `class_path`.

        Args:
            override: the override.
            place: dotted path of the object, without `init_args`.
            rest: what follows.
            config: the value of the layers there.
            base: the module of its type, in which a short class name is looked up.
        """
        if not rest or rest == ["class_path"]:
            self._choose(override, place, config, base)
            return
        path = self._chosen.get(place, config.get("class_path") if isinstance(config, Mapping) else None)
        arguments = config.get("init_args") if isinstance(config, Mapping) else None
        if rest[0] in ("init_args", "dict_kwargs"):
            inner, rest = rest[0], rest[1:]
            if inner == "dict_kwargs":
                return
        if not rest:
            self._check_mapping(override, place, path, _parsed(override.value))
            return
        self._check_argument(override, place, path, rest, arguments or {})

    def _choose(self, override: Override, place: str, config: Any, base: str) -> None:
        value = _parsed(override.value)
        if isinstance(value, Mapping):
            chosen = value.get("class_path", config.get("class_path") if isinstance(config, Mapping) else None)
            self._chosen[place] = chosen
            arguments = value.get("init_args", {} if "class_path" in value else value)
            self._check_mapping(override, place, chosen, arguments)
        elif isinstance(value, str):
            short = "." not in value
            known = find_class(f"{base}.{value}") if short and base else None
            self._chosen[place] = known.path if known is not None else None if short else value
        else:
            self._chosen[place] = None

    def _check_mapping(self, override: Override, place: str, class_path: str | None, value: Any) -> None:
        """Check the arguments of a class that are given as one mapping."""
        if isinstance(value, Mapping):
            for name, item in value.items():
                self._check_argument(override, place, class_path, [str(name)], {}, given=item)

    def _check_argument(
        self,
        override: Override,
        place: str,
        class_path: str | None,
        rest: list[str],
        config: Mapping[str, Any],
        given: Any = ...,
    ) -> None:
        """Check an argument of a class, down to the field of a nested dataclass.

        Args:
            override: the override.
            place: dotted path of the object, without `init_args`.
            class_path: its class, where it is known.
            rest: the argument, and what follows it.
            config: the arguments that the layers give.
            given: the argument's value where it is an item of a mapping; else the override's.
        """
        source = find_class(class_path) if class_path else None
        while source is not None:
            found = signature(source)
            if rest[0] not in found.parameters:
                if found.complete:
                    raise self._unknown(
                        override, [*place.split("."), *rest], [f"{place}.{name}" for name in found.parameters]
                    )
                return
            kind, place = found.parameters[rest[0]].kind, f"{place}.{rest[0]}"
            inner = config.get(rest[0])
            rest = rest[1:]
            if kind.dataclasses and not kind.classes:
                source, config = kind.dataclasses[0], inner if isinstance(inner, Mapping) else {}
                if rest:
                    continue
                value = _parsed(override.value) if given is ... else given
                for name, item in value.items() if isinstance(value, Mapping) else ():
                    self._check_argument(override, place, source.path, [str(name)], {}, given=item)
                return
            if kind.classes or (isinstance(inner, Mapping) and "class_path" in inner):
                if given is ...:
                    base = kind.classes[0].module if kind.classes else ""
                    self._check_class(override, place, rest, inner, base)
            elif not rest:
                self._check_value(override, kind, override.value if given is ... else given, place)
            return

    def _check_value(self, override: Override, kind: Kind, value: Any, place: str = "") -> None:
        """Check a value against a type, if the type allows nothing that is judged elsewhere."""
        name = (place or override.name.removesuffix("+")).rpartition(".")[2]
        parsed = _parsed(value) if isinstance(value, str) else value
        if kind.optional and parsed is None:
            return
        shown = value if isinstance(value, str) else yaml.safe_dump(value).removesuffix("...\n").strip()
        if kind.items and not kind.choices:
            items = parsed if isinstance(parsed, list) else [parsed] if override.name.endswith("+") else []
            for item in items:
                self._check_choice(override, name, str(item), kind.items)
            return
        if kind.others or kind.classes or kind.dataclasses or "str" in kind.scalars:
            return
        if any(_is_scalar(parsed, shown, scalar) for scalar in kind.scalars):
            return
        if kind.choices:
            if parsed not in kind.choices:
                self._check_choice(override, name, shown, kind.choices)
            return
        types = " or ".join(scalar for scalar in SCALARS if scalar in kind.scalars)
        if types:
            null = " or null" if kind.optional else ""
            raise InputError(f"--{override.name}: {name} is {shown!r}; expected {types}{null}.")

    def _check_choice(self, override: Override, name: str, value: str, choices: Sequence[Any]) -> None:
        names = [str(choice) for choice in choices]
        if value in names:
            return
        near = difflib.get_close_matches(value, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"--{override.name}: {name} is {value!r}; choose from: {', '.join(names)}{hint}")

    def _unknown(
        self, override: Override, path: Sequence[str] = (), siblings: Iterable[str] = ()
    ) -> UnknownSettingError:
        """Return the error of a setting that the stage does not have, with the nearest one that it has.

        Args:
            override: the override.
            path: what is unknown, where it is not the override's name but a part of its value.
            siblings: further settings beside it, of a class that the preset does not choose.
        """
        name = with_init_args(".".join(path) or override.name)
        known = [item.path for item in settings_of(self.stage, self.preset)]
        known += [f"trainer.{item}" for item in trainer_parameters()]
        near = nearest(name, [*known, *siblings])
        hint = f"Did you mean --{near}?" if near else f"`ctx-distill settings {self.stage.name}` lists the settings."
        what = "such setting" if name.rpartition(".")[2] == override.path[-1] else f"setting {name}"
        return UnknownSettingError(f"--{override.name}: stage {self.stage.name} has no {what}. {hint}")


def with_init_args(name: str) -> str:
    """Return the full name of a setting of the model or the data that is given without `init_args`."""
    head, *rest = name.split(".")
    if head not in ("model", "data") or rest[:1] in ([], ["init_args"], ["class_path"]):
        return name
    return ".".join([head, "init_args", *rest])


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name most similar to a wrong one: with a similar last part, in the same section if possible."""
    section, leaf = name.partition(".")[0], name.rpartition(".")[2]
    same = [item for item in known if item.partition(".")[0] == section]
    for names in (same, list(known)):
        if len(leaf) > 2 and (close := [item for item in names if item.rpartition(".")[2] == leaf]):
            return max(close, key=lambda item: difflib.SequenceMatcher(None, name, item).ratio())
        leaves = {item.rpartition(".")[2] for item in names}
        if likely := difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75):
            close = [item for item in names if item.rpartition(".")[2] == likely[0]]
            return max(close, key=lambda item: difflib.SequenceMatcher(None, name, item).ratio())
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    return close[0] if close else None


def _check_prefixes(stages: Sequence[Stage], arguments: Sequence[str]) -> None:
    """Refuse a first part of a name that is neither a section nor a stage.

    Raises:
        InputError: there is such a name.
    """
    known = ("model", "data", "trainer", *_ROOT, "c", *STAGES)
    names = ", ".join(stage.name for stage in stages)
    for override in split_overrides(arguments):
        head = override.path[0]
        if head not in known:
            near = difflib.get_close_matches(head, known, n=1)
            rest = override.name.removeprefix(head)
            hint = f"Did you mean --{near[0]}{rest}?" if near else "`ctx-distill settings STAGE` lists the settings."
            raise InputError(
                f"--{override.name}: unknown name {head!r}; expected model, data or trainer, or a stage ({names}) in"
                f" front of it. {hint}"
            )


def _with_stage(
    error: UnknownSettingError, stage: Stage, stages: Sequence[Stage], preset: str, override: Override
) -> str:
    """Return the message; where another stage of the command has the setting, with the advice to address that one."""
    for other in stages:
        if other is not stage:
            try:
                OverrideChecker(other, preset).check(override)
            except InputError:
                continue
            return (
                f"--{override.name}: stage {stage.name} has no such setting, but stage {other.name} has. Address it:"
                f" --{other.name}.{override.name}"
            )
    return str(error)


def _parsed(value: str | None) -> Any:
    """Return a value as YAML reads it; the text where it is no YAML."""
    try:
        return None if value is None else yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _is_scalar(parsed: Any, text: str, scalar: str) -> bool:
    if scalar == "bool":
        return isinstance(parsed, bool)
    if isinstance(parsed, bool):
        return False
    try:
        if scalar == "int":
            int(text)
        else:
            float(text)
    except ValueError:
        return False
    return True
