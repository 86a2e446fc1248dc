"""Findings of a free-text report: an extractor with assertion (present, absent, uncertain), and vocabularies (YAML)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ctx_distill.errors import InputError
from ctx_distill.text.assertion import ABSENT, PRESENT, UNCERTAIN
from ctx_distill.text.phrases import words
from ctx_distill.text.report_text import reading_pieces
from ctx_distill.text.sides import joined
from ctx_distill.text.vocabulary import Finding, Located, Vocabulary

__all__ = [
    "Finding",
    "Located",
    "Vocabulary",
    "extract",
    "extract_many",
    "extract_sides",
    "findings_set",
    "load_vocabulary",
    "shipped_vocabularies",
    "vocabulary_for",
]

_FOLDER = Path(__file__).with_name("vocabularies")
_LISTS = ("synonyms", "normal", "exclude", "denied", "contrary", "not_contrary")
_PLACES = ("terms", "sites", "elsewhere", "against")
_NO_VOCABULARIES = ("attributes", "cues")


_RANK = {PRESENT: 2, UNCERTAIN: 1, ABSENT: 0}


def _extract(text: str, vocabulary: Vocabulary) -> dict[int, int]:
    found: dict[int, int] = {}
    contradicted: set[int] = set()
    for sentence in reading_pieces(text):
        for number, assertion, _ in vocabulary.read(sentence):
            if number in vocabulary.rest and assertion != PRESENT:
                contradicted.add(number)
            elif number not in found or _RANK[assertion] > _RANK[found[number]]:
                found[number] = assertion
    return {number: assertion for number, assertion in found.items() if number not in contradicted}


def extract(text: str, vocabulary: Vocabulary) -> dict[str, int]:
    """Findings that a report speaks of.

    Args:
        text: a report, a section or a sentence.
        vocabulary: what to look for.

    Returns:
        finding -> 1 present, 0 absent, -1 uncertain; a finding that is not mentioned has no key. Where mentions
        disagree, present outranks uncertain, and uncertain absent, whatever their order (as CheXpert's labeler does). A
        finding with `contrary` phrases ("No Finding") is 1 or has no key: as with that labeler, whatever else is asserted or in
        doubt takes it away, but unlike there it needs a sentence that is understood (a report in Turkish is not normal).
    """
    found = _extract(text, vocabulary)
    return {finding.name: found[i] for i, finding in enumerate(vocabulary.findings) if i in found}


def extract_many(texts: Sequence[str], vocabulary: Vocabulary) -> NDArray[np.float32]:
    """Findings of N reports: (N, F) float32 of 1 present, 0 absent, -1 uncertain, NaN not mentioned.

    Args:
        texts: N reports; "" gives a row of NaN.
        vocabulary: F findings, the columns in their order.
    """
    result = np.full((len(texts), len(vocabulary.findings)), np.nan, dtype=np.float32)
    for row, text in enumerate(texts):
        for number, assertion in _extract(text, vocabulary).items():
            result[row, number] = assertion
    return result


def extract_sides(text: str, vocabulary: Vocabulary) -> dict[str, str]:
    """Sides of the findings that a report asserts: finding -> "left", "right" or "both".

    A finding without a side in the text, and one of an unpaired organ (heart, vessels, mediastinum), has no key.
    """
    sides: dict[int, list[str]] = {}
    for sentence in reading_pieces(text):
        for number, assertion, side in vocabulary.read(sentence):
            if assertion == PRESENT and side:
                sides.setdefault(number, []).append(side)
    return {finding.name: joined(sides[i]) for i, finding in enumerate(vocabulary.findings) if i in sides}


def findings_set(text: str, vocabulary: Vocabulary | None = None) -> frozenset[str]:
    """Names of the findings that a report asserts; empty for a normal study.

    Args:
        text: a report.
        vocabulary: what to look for; None is `load_vocabulary("ct-rate")`.
    """
    vocabulary = load_vocabulary("ct-rate") if vocabulary is None else vocabulary
    return frozenset(name for name, value in extract(text, vocabulary).items() if value == PRESENT)


def shipped_vocabularies() -> list[str]:
    """Names that `load_vocabulary` knows, sorted."""
    return sorted(path.stem.replace("_", "-") for path in _FOLDER.glob("*.yaml") if path.stem not in _NO_VOCABULARIES)


def load_vocabulary(name_or_path: str | Path) -> Vocabulary:
    """A shipped vocabulary by name ("ct-rate", "chexpert", "phantom") or one of the user's from a YAML file.

    The file holds `name` and `findings`: a mapping from a finding to `synonyms` (its name is always one), and optionally
    `normal`, `exclude`, `denied`, `located`, `region` and `visible_on_xray`; see `Finding`. With `contrary`, the file's other
    findings but those named in `not_contrary` count as contrary too.

    Raises:
        InputError: no such vocabulary, an unreadable file, or one that does not have this form.
    """
    path = Path(name_or_path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        path = _FOLDER / f"{str(name_or_path).lower().replace('-', '_')}.yaml"
        if path.parent != _FOLDER or path.stem in _NO_VOCABULARIES or not path.is_file():
            raise InputError(
                f"vocabulary {str(name_or_path)!r} is not known; expected one of {', '.join(shipped_vocabularies())}, "
                "or the path of a .yaml file: give one of these."
            )
    return _load(path.absolute())


@functools.cache
def _load(path: Path) -> Vocabulary:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a vocabulary in YAML: check the path.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{path}{line}: no valid YAML ({problem}); mend the file at this line.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("findings"), dict) or not raw["findings"]:
        raise InputError(
            f"{path}: found no mapping 'findings' with at least one finding; see ct_rate.yaml for the form."
        )
    findings = tuple(_finding(path, name, body) for name, body in raw["findings"].items())
    for name, count in Counter(finding.name.lower() for finding in findings).items():
        if count > 1:
            raise InputError(f"{path}: finding {name!r} stands {count} times (case does not count); keep one of them.")
    spared = {
        str(name): body.get("not_contrary") or () for name, body in raw["findings"].items() if isinstance(body, dict)
    }
    findings = tuple(_with_siblings(path, f, findings, spared.get(f.name, ())) if f.contrary else f for f in findings)
    return Vocabulary(str(raw.get("name", path.stem)), findings)


def _with_siblings(path: Path, finding: Finding, all_of_file: Sequence[Finding], spared: Sequence[str]) -> Finding:
    unknown = sorted(set(spared) - {other.name for other in all_of_file})
    if unknown:
        raise InputError(
            f"{path}: finding {finding.name!r}, not_contrary: {unknown[0]!r} is none of the file's findings; mend the name."
        )
    others = [other for other in all_of_file if other is not finding and other.name not in spared]
    contrary = [
        phrase
        for o in others
        for phrase in (*o.synonyms, *o.denied, *(term for rule in o.located for term in rule.terms))
    ]
    return replace(
        finding,
        contrary=tuple(dict.fromkeys((*finding.contrary, *contrary))),
        supporting=tuple(dict.fromkeys(phrase for other in others for phrase in other.normal)),
    )


def _finding(path: Path, name: object, body: Any) -> Finding:
    where = f"{path}: finding {name!r}"
    if not isinstance(name, str) or not words(name):
        raise InputError(f"{where}: expected a name in words; quote it if YAML reads it as something else.")
    body = {} if body is None else body
    if not isinstance(body, dict):
        raise InputError(f"{where}: found {body!r}, expected a mapping with 'synonyms'.")
    unknown = sorted(str(key) for key in body if key not in (*_LISTS, "located", "region", "visible_on_xray"))
    if unknown:
        raise InputError(
            f"{where}: unknown key {unknown[0]!r}, expected {', '.join(_LISTS)}, located, region or visible_on_xray; "
            "mend or remove it."
        )
    lists = {key: _phrases(f"{where}, {key}", body.get(key)) for key in _LISTS}
    rules = body.get("located") or []
    if not isinstance(rules, list):
        raise InputError(f"{where}, located: found {rules!r}, expected a list of mappings with 'terms'.")
    located = tuple(_located(f"{where}, located {i + 1}", rule) for i, rule in enumerate(rules))
    region, visible = body.get("region"), body.get("visible_on_xray")
    if region is not None and not isinstance(region, str):
        raise InputError(f"{where}, region: found {region!r}, expected a word such as 'pleura'.")
    if visible is not None and not isinstance(visible, bool):
        raise InputError(f"{where}, visible_on_xray: found {visible!r}, expected true or false.")
    synonyms = tuple(dict.fromkeys((*lists["synonyms"], name.replace("_", " "))))
    return Finding(
        name, synonyms, lists["normal"], lists["exclude"], region, visible, lists["denied"], located,
        lists["contrary"],
    )  # fmt: skip


def _phrases(where: str, phrases: Any) -> tuple[str, ...]:
    phrases = phrases or []
    if not isinstance(phrases, list):
        raise InputError(f"{where}: found {phrases!r}, expected a list of phrases.")
    for phrase in phrases:
        if not isinstance(phrase, str) or not all(words(part) for part in phrase.split("...")):
            raise InputError(
                f"{where}: found {phrase!r}, expected words (and '...' only between words); "
                "quote it if YAML reads it as something else."
            )
    return tuple(phrases)


def _located(where: str, rule: Any) -> Located:
    if not isinstance(rule, dict) or not rule.get("terms") or set(rule) - {*_PLACES, "required"}:
        raise InputError(f"{where}: found {rule!r}, expected 'terms' and {', '.join(_PLACES[1:])} or required.")
    required = rule.get("required", False)
    if not isinstance(required, bool):
        raise InputError(f"{where}, required: found {required!r}, expected true or false.")
    if not any(rule.get(key) for key in _PLACES[1:]):
        raise InputError(
            f"{where}: names no place; give {', '.join(_PLACES[1:])}, or put the terms among the synonyms."
        )
    terms, sites, elsewhere, against = (_phrases(f"{where}, {key}", rule.get(key)) for key in _PLACES)
    return Located(terms, sites, elsewhere, against, required)


def vocabulary_for(finding_names: Iterable[str]) -> Vocabulary:
    """The vocabulary of a manifest's label names, put together from the shipped ones.

    Args:
        finding_names: F distinct names; their order and spelling are kept. Case and underscores do not matter for the
            lookup. A name is taken from the shipped vocabulary that knows most of the names; one that none knows
            becomes its own synonym.

    Raises:
        InputError: a name without a word, or one given twice.
    """
    names = tuple(finding_names)
    for name, count in Counter(_key(name) for name in names).items():
        if not name or count > 1:
            raise InputError(f"finding names: {name!r} found {count} times, expected distinct names in words; rename.")
    return _vocabulary_for(names)


def _key(name: str) -> str:
    return " ".join(words(name.replace("_", " ")))


@functools.lru_cache(maxsize=64)
def _vocabulary_for(names: tuple[str, ...]) -> Vocabulary:
    shipped = [load_vocabulary(name) for name in shipped_vocabularies()]
    known = [{_key(finding.name): finding for finding in vocabulary.findings} for vocabulary in shipped]
    keys = [_key(name) for name in names]
    # the sort is stable: among equals, the alphabet decides
    order = sorted(range(len(shipped)), key=lambda i: -sum(key in known[i] for key in keys))
    findings, used = [], set()
    for name, key in zip(names, keys):
        source = next((i for i in order if key in known[i]), None)
        if source is None:
            findings.append(Finding(name, (name.replace("_", " "),)))
        else:
            found = known[source][key]
            used.add(source)
            findings.append(replace(found, name=name))
    masks = [
        phrase
        for i in sorted(used)
        for finding in shipped[i].findings
        if _key(finding.name) not in keys
        for phrase in (
            *finding.synonyms,
            *finding.exclude,
            *finding.denied,
            *(term for rule in finding.located for term in rule.terms),
        )
        if "..." not in phrase
    ]
    return Vocabulary("+".join(shipped[i].name for i in sorted(used)) or "names", tuple(findings), tuple(masks))
