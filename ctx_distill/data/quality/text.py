"""Check reports for missing text, duplicates, and personal data: names, dates and numbers."""

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
"""Length in characters from which equal reports are more likely copies than templates of normal studies."""


def check_text(report: str) -> list[Fault]:
    """Return faults for a missing text or possible personal data; the fault does not quote the text."""
    if not report:
        return [Fault("note", "no_text", "neither findings nor impression")]
    faults = []
    for kind, pattern in (("date", _DATE), ("name", _NAME), ("number", _NUMBER)):
        if match := pattern.search(report):
            message = f"possible personal {kind} at character {match.start() + 1}"
            faults.append(Fault("warning", f"text_{kind}", message))
    return faults


def identical_texts(items: Iterable[tuple[str, str, str]]) -> dict[str, Fault]:
    """Return a fault for each image whose long report is identical to that of another patient.

    Args:
        items: image id, patient id and report of each image.
    """
    seen: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for image, patient, report in items:
        if len(report) >= _LONG_ENOUGH:
            seen[report].append((image, patient))
    faults = {}
    for images in seen.values():
        patients = {patient for _, patient in images}
        if len(patients) > 1:
            text = f"identical report for {len(patients)} patients"
            faults.update({image: Fault("note", "identical_text", text) for image, _ in images})
    return faults
