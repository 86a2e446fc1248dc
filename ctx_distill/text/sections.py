"""A report's findings and impression out of the whole text, and marks of de-identification out of both."""

from __future__ import annotations

import re

from ctx_distill.text.report_text import NO_TEXT

_HEADING = re.compile(r"(?:^|(?<=[\s.]))([A-Z][A-Z0-9/&(), -]{2,60}?)\s*:(?!\d)")
_FINDINGS = re.compile(r"FINDINGS?\b|REPORT$|BODY OF REPORT|COMPARATIVE FINDINGS")
_IMPRESSION = re.compile(r"(?:FINAL |SUMMARY )?IMPRESSIONS?\b|CONCLUSIONS?\b|SUMMARY$|OPINION|ASSESSMENT|DIAGNOSIS")
# Headings in other letters ("Findings:", "impression:") are only believed where they are among these words and open a line
# behind a finished one, or stand behind a sentence of a report that itself opens with such a heading.
_SOFT_NAMES = (
    r"findings?|impressions?|findings and impression|conclusions?|opinion|summary|indications?|clinical (?:history|indication|information)"
    r"|history|reason for (?:exam|examination|study)|technique|comparison|exam|examination|procedure"
)
_SOFT = re.compile(rf"(?:\A|(?<=\n)|(?<=[.!?] ))[ \t]*({_SOFT_NAMES})[ \t]*:(?!\d)", re.IGNORECASE)
# Sections about the examination or the patient's past; what they say is not seen in the picture.
_ASIDE = re.compile(
    r"INDICATION|(?:CLINICAL |PATIENT |MEDICAL )?HISTORY|CLINICAL|REASON|TECHNIQUE|TECHNICAL|COMPARISON|EXAM|STUDY|PROCEDURE|"
    r"WET READ|NOTIFICATION|DATE|ACCESSION|PROVISIONAL|ORDER|PHYSICIAN|REFERRING|DICTATED|SIGNED|ELECTRONICALLY|NARRATIVE"
)
_TITLE_LINE = re.compile(r"^\s*(?:FINAL REPORT|FINAL ADDENDUM|ADDENDUM|RADIOLOGY REPORT)\s*$", re.MULTILINE)
_FILM = re.compile(r"(?<![A-Za-z])[xX]-X{3,}")
_MARK = re.compile(r"\[\*\*.*?\*\*\]|\[(?:REMOVED|REDACTED|DEIDENTIFIED|DE-IDENTIFIED)\]|_{2,}|(?<![A-Za-z])X{3,}(?:'s|[A-Z]+)?(?![A-Za-z])", re.DOTALL)  # fmt: skip


def without_marks(text: str) -> str:
    """A text without what de-identification left in it, and without holes where that stood.

    `___` (MIMIC-CXR), `XXXX` (Open-I) and `[**...**]` (MIMIC-III) go; `x-XXXX` becomes "x-ray", the word that Open-I's program
    took for a name. "Not given." and its like become "".
    """
    if text.strip().lower() in NO_TEXT:
        return ""
    text = _MARK.sub(" ", _FILM.sub("x-ray", text))
    text = re.sub(r"\(\s*[,;/-]*\s*\)", " ", text)
    text = re.sub(r"[ \t]+([.,;:!?)])", r"\1", text)
    text = re.sub(r"([.,;:])(?:\s*[,;:])+", r"\1", text)
    text = re.sub(r"(?<!\.)\.(?:\s*\.)+(?=\s|$)", ".", text)
    text = re.sub(r"(?m)(^|[.!?]\s)\s*[.,;:]+(?=\s|$)", r"\1", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines()).strip()


def cut_report(text: str) -> tuple[str, str]:
    """Findings and impression of a report with headings ("FINDINGS:", "IMPRESSION:", or "Findings:" at the start of a line).

    "Findings: none" is a sentence. A heading of another kind ("LUNGS:") stays where it stands. Indication, technique, comparison and their like are left
    out; a paragraph behind one of them belongs to the body. A report without either heading is all findings;
    "FINDINGS AND IMPRESSION" are findings.
    """
    text = _TITLE_LINE.sub("", text)
    parts: dict[str, list[str]] = {"body": [], "findings": [], "impression": [], "aside": []}
    section, start = "body", 0
    for match in _headings(text):
        kind = _kind(match.group(1).strip().upper())
        if kind is None:
            continue
        _keep(parts, section, text[start : match.start()])
        section, start = kind, match.end()
    _keep(parts, section, text[start:])
    findings, impression, body = (" ".join(parts[name]).strip() for name in ("findings", "impression", "body"))
    if (not findings and not impression) or (not findings and len(body) > len(impression)):
        findings = body
    return without_marks(findings), without_marks(impression)


def _headings(text: str) -> list[re.Match[str]]:
    """The headings of a report, by place; those in other letters where they are believed."""
    capitals = {match.start(1): match for match in _HEADING.finditer(text)}
    others = [match for match in _SOFT.finditer(text) if match.start(1) not in capitals]
    opens = any(not text[: match.start(1)].strip() for match in (*capitals.values(), *others))
    found = dict(capitals)
    for match in others:
        before, kind = text[: match.start(1)].rstrip(" \t"), _kind(match.group(1).upper())
        own_line = not before or before[-1] == "\n"
        finished = not before.strip() or before.rstrip()[-1] in ".!?:" or re.search(r"\n[ \t]*\n\Z", before)
        first_line = text[match.end() :].lstrip().partition("\n")[0].strip().lower().rstrip(".")
        if finished and (own_line or opens) and (kind == "aside" or first_line not in NO_TEXT):
            found[match.start(1)] = match
    ends = [
        place for place, match in found.items() if _kind(match.group(1).strip().upper()) in ("findings", "impression")
    ]
    for match in others:
        # nothing says where it ends, and the whole report would be taken for it
        goes_on = max(ends, default=-1) > match.start(1) or re.search(r"\n[ \t]*\n", text[match.end() :].strip())
        if _kind(match.group(1).upper()) == "aside" and not goes_on:
            found.pop(match.start(1), None)
    return [found[place] for place in sorted(found)]


def _kind(heading: str) -> str | None:
    for name, pattern in (("findings", _FINDINGS), ("impression", _IMPRESSION), ("aside", _ASIDE)):
        if pattern.match(heading):
            return name
    return None


def _keep(parts: dict[str, list[str]], section: str, text: str) -> None:
    if section == "aside":
        # An aside is one paragraph; what follows an empty line is the report going on without a heading.
        text = "\n\n".join(re.split(r"\n\s*\n", text.strip())[1:])
        section = "body"
    if text.strip():
        parts[section].append(text.strip())
