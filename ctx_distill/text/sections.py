"""Split a report into findings and impression, and remove de-identification marks."""

from __future__ import annotations

import re

from ctx_distill.text.report_text import NO_TEXT

_HEADING = re.compile(r"(?:^|(?<=[\s.]))([A-Z][A-Z0-9/&(), -]{2,60}?)\s*:(?!\d)")
_FINDINGS = re.compile(r"FINDINGS?\b|REPORT$|BODY OF REPORT|COMPARATIVE FINDINGS")
_IMPRESSION = re.compile(r"(?:FINAL |SUMMARY )?IMPRESSIONS?\b|CONCLUSIONS?\b|SUMMARY$|OPINION|ASSESSMENT|DIAGNOSIS")
# Headings that are not in capitals ("Findings:", "impression:") count only if they are among these words and start a line
# after a finished one, or follow a sentence in a report that starts with such a heading.
_SOFT_NAMES = (
    r"findings?|impressions?|findings and impression|conclusions?|opinion|summary|indications?|clinical (?:history|indication|information)"
    r"|history|reason for (?:exam|examination|study)|technique|comparison|exam|examination|procedure"
)
_SOFT = re.compile(rf"(?:\A|(?<=\n)|(?<=[.!?] ))[ \t]*({_SOFT_NAMES})[ \t]*:(?!\d)", re.IGNORECASE)
# Sections about the examination or the patient's history, which do not describe the image.
_ASIDE = re.compile(
    r"INDICATION|(?:CLINICAL |PATIENT |MEDICAL )?HISTORY|CLINICAL|REASON|TECHNIQUE|TECHNICAL|COMPARISON|EXAM|STUDY|PROCEDURE|"
    r"WET READ|NOTIFICATION|DATE|ACCESSION|PROVISIONAL|ORDER|PHYSICIAN|REFERRING|DICTATED|SIGNED|ELECTRONICALLY|NARRATIVE"
)
_TITLE_LINE = re.compile(r"^\s*(?:FINAL REPORT|FINAL ADDENDUM|ADDENDUM|RADIOLOGY REPORT)\s*$", re.MULTILINE)
_FILM = re.compile(r"(?<![A-Za-z])[xX]-X{3,}")
_MARK = re.compile(r"\[\*\*.*?\*\*\]|\[(?:REMOVED|REDACTED|DEIDENTIFIED|DE-IDENTIFIED)\]|_{2,}|(?<![A-Za-z])X{3,}(?:'s|[A-Z]+)?(?![A-Za-z])", re.DOTALL)  # fmt: skip


def without_marks(text: str) -> str:
    """Remove de-identification marks and the gaps that they leave.

    Removes `___` (MIMIC-CXR), `XXXX` (Open-I) and `[**...**]` (MIMIC-III). `x-XXXX` becomes "x-ray", which Open-I's program
    mistook for a name. Placeholders such as "Not given." become "".
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
    """Return findings and impression of a report with headings.

    Headings are "FINDINGS:", "IMPRESSION:", or "Findings:" at the start of a line; "Findings: none" is a sentence. Other
    headings ("LUNGS:") stay in the text. Indication, technique, comparison and similar sections are dropped; a paragraph
    after one of them belongs to the body. A report without headings is returned as findings, and so is "FINDINGS AND
    IMPRESSION".
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
    """Return the headings of a report in order, including valid ones that are not in capitals."""
    capitals = {match.start(1): match for match in _HEADING.finditer(text)}
    others = [match for match in _SOFT.finditer(text) if match.start(1) not in capitals]
    opens = any(not text[: match.start(1)].strip() for match in (*capitals.values(), *others))
    headings = dict(capitals)
    for match in others:
        before, kind = text[: match.start(1)].rstrip(" \t"), _kind(match.group(1).upper())
        starts_line = not before or before[-1] == "\n"
        finished = not before.strip() or before.rstrip()[-1] in ".!?:" or re.search(r"\n[ \t]*\n\Z", before)
        first_line = text[match.end() :].lstrip().partition("\n")[0].strip().lower().rstrip(".")
        if finished and (starts_line or opens) and (kind == "aside" or first_line not in NO_TEXT):
            headings[match.start(1)] = match
    ends = [
        place
        for place, match in headings.items()
        if _kind(match.group(1).strip().upper()) in ("findings", "impression")
    ]
    for match in others:
        # its end is unknown, and the rest of the report would be dropped with it
        goes_on = max(ends, default=-1) > match.start(1) or re.search(r"\n[ \t]*\n", text[match.end() :].strip())
        if _kind(match.group(1).upper()) == "aside" and not goes_on:
            headings.pop(match.start(1), None)
    return [headings[place] for place in sorted(headings)]


def _kind(heading: str) -> str | None:
    for name, pattern in (("findings", _FINDINGS), ("impression", _IMPRESSION), ("aside", _ASIDE)):
        if pattern.match(heading):
            return name
    return None


def _keep(parts: dict[str, list[str]], section: str, text: str) -> None:
    if section == "aside":
        # An aside is one paragraph; after an empty line the report continues without a heading.
        text = "\n\n".join(re.split(r"\n\s*\n", text.strip())[1:])
        section = "body"
    if text.strip():
        parts[section].append(text.strip())
