"""Faults of the reports: none, the same again, and what should not be in them: names, dates, numbers of patients."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from ctx_distill.data.quality.faults import Fault

_MONTH = "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
_DATE = re.compile(
    r"\b(?:19|20)\d\d[-/.](?:0?[1-9]|1[0-2])[-/.](?:0?[1-9]|[12]\d|3[01])\b"
    r"|\b(?:0?[1-9]|[12]\d|3[01])([/.-])(?:0?[1-9]|[12]\d|3[01])\1(?:(?:19|20)\d\d|[0-4]\d)\b(?! (?:mm|cm|degrees))"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?[\s-](?:of )?(?:{_MONTH})[.,]?[\s-](?:19|20)\d\d\b"
    rf"|\b(?:{_MONTH})\.? \d{{1,2}}(?:st|nd|rd|th)?,? (?:19|20)\d\d\b",
    re.IGNORECASE,
)
_UPPER = "[A-ZÀ-ÖØ-ÞĞİŞ]"
_NAME = re.compile(
    rf"\b(?:Dr|Prof|Mr|Mrs|Ms|Miss|Doctor|Professor)(?:\.\s?|\s)(?:{_UPPER}\.\s?)*{_UPPER}\w+"
    r"|\b(?:[Dd]ictated|[Ss]igned|[Rr]eported|[Rr]eviewed|[Aa]pproved|[Vv]erified) by:? [A-Z][a-z]+ [A-Z][a-z]+"
    r"|\b[Pp]atient(?:'s)? name\b"
)  # fmt: skip
_NUMBER = re.compile(
    r"\b(?:MRN|[Mm]edical record|[Aa]ccession|[Pp]atient ID|SSN|[Pp]rotocol no)\b[^.\n]{0,20}\d{3,}"
    r"|(?<![\d.,])\d{7,}(?![\d.,]\d)"
    r"|\b\+?\d{1,3}[ -]\(?\d{3}\)?[ -]\d{3}[ -]\d{4}\b|\b[\w.+-]+@[\w-]+\.\w{2,}\b"
)  # fmt: skip
_LONG_ENOUGH = 200
"""Characters from which two equal reports are more likely a copy than a template of a normal study."""


def check_text(report: str) -> list[Fault]:
    """Whether there is a text, and whether it tells who the patient is; the text itself is not repeated."""
    if not report:
        return [Fault("note", "no_text", "neither findings nor impression")]
    found = []
    for kind, pattern in (("date", _DATE), ("name", _NAME), ("number", _NUMBER)):
        if match := pattern.search(report):
            told = f"may hold a {kind} of a person at character {match.start() + 1}"
            found.append(Fault("warning", f"text_{kind}", told))
    return found


def identical_texts(items: Iterable[tuple[str, str, str]]) -> dict[str, Fault]:
    """A fault for each image whose long report stands word for word with another patient.

    Args:
        items: image id, patient id, report.
    """
    seen: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for image, patient, report in items:
        if len(report) >= _LONG_ENOUGH:
            seen[report].append((image, patient))
    faults = {}
    for several in seen.values():
        patients = {patient for _, patient in several}
        if len(patients) > 1:
            text = f"the same report, word for word, stands with {len(patients)} patients"
            faults.update({image: Fault("note", "identical_text", text) for image, _ in several})
    return faults
