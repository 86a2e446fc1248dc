"""Extract findings from free-text reports with assertion (present, absent, uncertain), using YAML vocabularies."""

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
    assertions: dict[int, int] = {}
    contradicted: set[int] = set()
    for sentence in reading_pieces(text):
        for number, assertion, _ in vocabulary.read(sentence):
            if number in vocabulary.rest and assertion != PRESENT:
                contradicted.add(number)
            elif number not in assertions or _RANK[assertion] > _RANK[assertions[number]]:
                assertions[number] = assertion
    return {number: assertion for number, assertion in assertions.items() if number not in contradicted}


def extract(text: str, vocabulary: Vocabulary) -> dict[str, int]:
    """Extract the findings that a report mentions.

    Args:
        text: report, section or sentence.
        vocabulary: findings to extract.

    Returns:
        1 (present), 0 (absent) or -1 (uncertain) by finding; findings that are not mentioned have no key. If mentions
        disagree, present takes precedence over uncertain, and uncertain over absent, as in CheXpert's labeler. A finding
        with `contrary` phrases ("No Finding") is 1 or has no key. As in that labeler, any other asserted or uncertain
        finding removes it; unlike there, it requires a recognised sentence, so a Turkish report is not normal.
    """
    assertions = _extract(text, vocabulary)
    return {finding.name: assertions[i] for i, finding in enumerate(vocabulary.findings) if i in assertions}


def extract_many(texts: Sequence[str], vocabulary: Vocabulary) -> NDArray[np.float32]:
    """Extract the findings of N reports.

    Args:
        texts: N reports; "" gives a row of NaN.
        vocabulary: F findings, in the order of the columns.

    Returns:
        (N, F) float32: 1 present, 0 absent, -1 uncertain, NaN not mentioned.
    """
    result = np.full((len(texts), len(vocabulary.findings)), np.nan, dtype=np.float32)
    for row, text in enumerate(texts):
        for number, assertion in _extract(text, vocabulary).items():
            result[row, number] = assertion
    return result


def extract_sides(text: str, vocabulary: Vocabulary) -> dict[str, str]:
    """Return the sides of the findings that a report asserts: "left", "right" or "both" by finding.

    Findings without a side in the text, or of unpaired organs (heart, vessels, mediastinum), have no key.
    """
    sides: dict[int, list[str]] = {}
    for sentence in reading_pieces(text):
        for number, assertion, side in vocabulary.read(sentence):
            if assertion == PRESENT and side:
                sides.setdefault(number, []).append(side)
    return {finding.name: joined(sides[i]) for i, finding in enumerate(vocabulary.findings) if i in sides}


def findings_set(text: str, vocabulary: Vocabulary | None = None) -> frozenset[str]:
    """Return the names of the findings that a report asserts; empty for a normal study.

    Args:
        text: report text.
        vocabulary: findings to extract; None is `load_vocabulary("ct-rate")`.
    """
    vocabulary = load_vocabulary("ct-rate") if vocabulary is None else vocabulary
    return frozenset(name for name, value in extract(text, vocabulary).items() if value == PRESENT)


def shipped_vocabularies() -> list[str]:
    """Return the sorted names of the shipped vocabularies."""
    return sorted(path.stem.replace("_", "-") for path in _FOLDER.glob("*.yaml") if path.stem not in _NO_VOCABULARIES)


def load_vocabulary(name_or_path: str | Path) -> Vocabulary:
    """Load a shipped vocabulary by name ("ct-rate", "chexpert", "phantom"), or a custom one from a YAML file.

    The file contains `name` and `findings`, which maps each finding to `synonyms` (its name is always included) and
    optionally `normal`, `exclude`, `denied`, `located`, `region` and `visible_on_xray`; see `Finding`. For a finding with
    `contrary`, all other findings of the file except those in `not_contrary` are contrary too.

    Raises:
        InputError: an unknown vocabulary, an unreadable file, or an invalid format.
    """
    path = Path(name_or_path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        path = _FOLDER / f"{str(name_or_path).lower().replace('-', '_')}.yaml"
        if path.parent != _FOLDER or path.stem in _NO_VOCABULARIES or not path.is_file():
            raise InputError(
                f"unknown vocabulary {str(name_or_path)!r}; choose from: {', '.join(shipped_vocabularies())}, "
                "or pass the path of a .yaml file"
            )
    return _load(path.absolute())


@functools.cache
def _load(path: Path) -> Vocabulary:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot read the file ({error}); expected a vocabulary in YAML, check the path"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{path}{line}: invalid YAML ({problem}); correct this line") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("findings"), dict) or not raw["findings"]:
        raise InputError(f"{path}: no mapping 'findings' with at least one finding; see ct_rate.yaml for the format")
    findings = tuple(_finding(path, name, body) for name, body in raw["findings"].items())
    for name, count in Counter(finding.name.lower() for finding in findings).items():
        if count > 1:
            raise InputError(f"{path}: finding {name!r} occurs {count} times (case-insensitive); keep one of them")
    not_contrary = {
        str(name): body.get("not_contrary") or () for name, body in raw["findings"].items() if isinstance(body, dict)
    }
    findings = tuple(
        _with_siblings(path, f, findings, not_contrary.get(f.name, ())) if f.contrary else f for f in findings
    )
    return Vocabulary(str(raw.get("name", path.stem)), findings)


def _with_siblings(
    path: Path, finding: Finding, all_findings: Sequence[Finding], not_contrary: Sequence[str]
) -> Finding:
    unknown = sorted(set(not_contrary) - {other.name for other in all_findings})
    if unknown:
        raise InputError(
            f"{path}: finding {finding.name!r}, not_contrary: {unknown[0]!r} is not a finding of this file; correct the name"
        )
    others = [other for other in all_findings if other is not finding and other.name not in not_contrary]
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
        raise InputError(f"{where}: expected a name with words; quote it if YAML parses it as another type")
    body = {} if body is None else body
    if not isinstance(body, dict):
        raise InputError(f"{where}: found {body!r}; expected a mapping with 'synonyms'")
    unknown = sorted(str(key) for key in body if key not in (*_LISTS, "located", "region", "visible_on_xray"))
    if unknown:
        raise InputError(
            f"{where}: unknown key {unknown[0]!r}; expected {', '.join(_LISTS)}, located, region or visible_on_xray. "
            "Correct or remove it"
        )
    lists = {key: _phrases(f"{where}, {key}", body.get(key)) for key in _LISTS}
    rules = body.get("located") or []
    if not isinstance(rules, list):
        raise InputError(f"{where}, located: found {rules!r}; expected a list of mappings with 'terms'")
    located = tuple(_located(f"{where}, located {i + 1}", rule) for i, rule in enumerate(rules))
    region, visible = body.get("region"), body.get("visible_on_xray")
    if region is not None and not isinstance(region, str):
        raise InputError(f"{where}, region: found {region!r}; expected a word such as 'pleura'")
    if visible is not None and not isinstance(visible, bool):
        raise InputError(f"{where}, visible_on_xray: found {visible!r}; expected true or false")
    synonyms = tuple(dict.fromkeys((*lists["synonyms"], name.replace("_", " "))))
    return Finding(
        name, synonyms, lists["normal"], lists["exclude"], region, visible, lists["denied"], located,
        lists["contrary"],
    )  # fmt: skip


def _phrases(where: str, phrases: Any) -> tuple[str, ...]:
    phrases = phrases or []
    if not isinstance(phrases, list):
        raise InputError(f"{where}: found {phrases!r}; expected a list of phrases")
    for phrase in phrases:
        if not isinstance(phrase, str) or not all(words(part) for part in phrase.split("...")):
            raise InputError(
                f"{where}: found {phrase!r}; expected words (and '...' only between words). "
                "Quote it if YAML parses it as another type"
            )
    return tuple(phrases)


def _located(where: str, rule: Any) -> Located:
    if not isinstance(rule, dict) or not rule.get("terms") or set(rule) - {*_PLACES, "required"}:
        raise InputError(f"{where}: found {rule!r}; expected 'terms' and {', '.join(_PLACES[1:])} or required")
    required = rule.get("required", False)
    if not isinstance(required, bool):
        raise InputError(f"{where}, required: found {required!r}; expected true or false")
    if not any(rule.get(key) for key in _PLACES[1:]):
        raise InputError(f"{where}: no place; add {', '.join(_PLACES[1:])}, or move the terms to the synonyms")
    terms, sites, elsewhere, against = (_phrases(f"{where}, {key}", rule.get(key)) for key in _PLACES)
    return Located(terms, sites, elsewhere, against, required)


def vocabulary_for(finding_names: Iterable[str]) -> Vocabulary:
    """Build the vocabulary of a manifest's label names from the shipped vocabularies.

    Args:
        finding_names: F distinct names; their order and spelling are kept. The lookup ignores case and underscores and
            prefers the shipped vocabulary that contains most of the names. An unknown name is its own synonym.

    Raises:
        InputError: a name without a word, or a duplicate name.
    """
    names = tuple(finding_names)
    for name, count in Counter(_key(name) for name in names).items():
        if not name or count > 1:
            raise InputError(
                f"finding names: {name!r} occurs {count} times; expected distinct names with words, rename them"
            )
    return _vocabulary_for(names)


def _key(name: str) -> str:
    return " ".join(words(name.replace("_", " ")))


@functools.lru_cache(maxsize=64)
def _vocabulary_for(names: tuple[str, ...]) -> Vocabulary:
    shipped = [load_vocabulary(name) for name in shipped_vocabularies()]
    known = [{_key(finding.name): finding for finding in vocabulary.findings} for vocabulary in shipped]
    keys = [_key(name) for name in names]
    # the sort is stable: ties are broken alphabetically
    order = sorted(range(len(shipped)), key=lambda i: -sum(key in known[i] for key in keys))
    findings, used = [], set()
    for name, key in zip(names, keys):
        source = next((i for i in order if key in known[i]), None)
        if source is None:
            findings.append(Finding(name, (name.replace("_", " "),)))
        else:
            finding = known[source][key]
            used.add(source)
            findings.append(replace(finding, name=name))
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
