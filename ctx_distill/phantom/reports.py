"""Writes the report of a study from what is planted in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctx_distill.phantom import wordings
from ctx_distill.phantom.planted_findings import FINDINGS, KINDS, PlantedFinding

Style = Literal["ct", "xray"]


@dataclass(frozen=True)
class Report:
    """The two sections of a report; one of them may be empty, never both.

    Attributes:
        findings: what was seen.
        impression: the conclusion.
        mentioned: the findings that the report affirms.
    """

    findings: str
    impression: str
    mentioned: tuple[str, ...]


def words(finding: PlantedFinding) -> dict[str, str]:
    """What fills the braces of a wording: side, place and size in words and in numbers."""
    grade = ("mild", "moderate", "severe")[min(int(finding.extent * 3), 2)]
    size = ("small", "moderate", "large")[min(int(finding.extent * 3), 2)]
    place = finding.place if finding.place in ("upper", "middle", "lower") else "lower"
    return {
        "side": finding.side,
        "lobe": f"{finding.side} {place} lobe",
        "zone": {"middle": "mid"}.get(place, place),
        "lung": f"{finding.side} {place} lobe" if finding.place in ("upper", "lower") else f"{finding.side} lung",
        "size": size,
        "grade": grade,
        "degree": {"mild": "mildly", "moderate": "moderately", "severe": "markedly"}[grade],
        "spread": ("focal", "patchy", "extensive")[min(int(finding.extent * 3), 2)],
        "pattern": "with upper lobe predominance" if finding.place == "upper" else "diffusely in both lungs",
        "mm": f"{finding.size:.0f}",
        "cm": f"{finding.size / 10:.1f}",
        "depth": f"{22 + 40 * finding.extent:.0f}",
    }


def sentence(finding: PlantedFinding, style: Style, rng: np.random.Generator) -> str:
    """One affirming sentence of the style's wordings."""
    table = wordings.CT if style == "ct" else wordings.FILM
    options = table.get(f"{finding.name}/both") if finding.side == "both" else None
    options = options or table[finding.name]
    text = options[int(rng.integers(len(options)))].format(**words(finding))
    return text[0].upper() + text[1:]


def write_report(findings: list[PlantedFinding], style: Style, contrast: bool, rng: np.random.Generator) -> Report:
    """Writes a report.

    A CT's report mentions everything; a radiograph's what is visible (`Kind.on_film`), and large findings sooner.
    Only findings that are truly absent are denied by name; a sentence of normality goes by what was seen.

    Args:
        findings: what is planted.
        style: of a CT (longer, measurements) or of a radiograph (short, zones).
        contrast: whether contrast medium was given.
        rng: the study's generator of words.
    """
    seen = findings
    if style == "xray":
        chance = [KINDS[f.name].on_film ** (1.5 - f.extent) for f in findings]
        seen = [f for f, p in zip(findings, chance, strict=True) if rng.random() < p]
    positives = [sentence(f, style, rng) for f in seen]
    body = positives + _normality(findings, seen, style, rng)
    order = rng.permutation(len(body))
    openings = wordings.CT_OPENING if style == "ct" else wordings.FILM_OPENING
    medium = "with intravenous contrast" if contrast else "without intravenous contrast"
    opening = openings[int(rng.integers(len(openings)))].format(medium=medium)
    text = " ".join([part for part in [opening, *(body[i] for i in order)] if part])
    summary = _impression(seen, style, rng)
    empty = rng.random()
    if empty < 0.03:
        text = ""
    elif empty < (0.12 if style == "ct" else 0.2):
        summary = ""
    return Report(text, summary, tuple(f.name for f in seen))


def _normality(
    planted: list[PlantedFinding], seen: list[PlantedFinding], style: Style, rng: np.random.Generator
) -> list[str]:
    """Denials, statements of normality and remarks that say nothing of any finding."""
    true, noted = {f.name for f in planted}, {f.name for f in seen}
    long = style == "ct"
    lines, told = [], set(true)
    for rules_out, ct_lines, film_lines in wordings.NORMAL:
        options = ct_lines if long else film_lines
        if options and not (rules_out & noted) and rng.random() < (0.6 if long else 0.5):
            lines.append(options[int(rng.integers(len(options)))])
            told |= rules_out
    if rng.random() < 0.45:
        first, second, text = wordings.PAIRS[int(rng.integers(len(wordings.PAIRS)))]
        if not {first, second} & told:
            lines.append(text)
            told |= {first, second}
    # What a film cannot show is not denied on one.
    deniable = [n for n in FINDINGS if n not in told and (long or KINDS[n].on_film > 0.7)]
    for name in rng.permutation(np.array(deniable, dtype=object))[: int(rng.integers(1, 5 if long else 3))]:
        options = wordings.ABSENT[str(name)]
        lines.append(options[int(rng.integers(len(options)))])
    remarks = wordings.CT_FILLER if long else wordings.FILM_FILLER
    for index in rng.permutation(len(remarks))[: int(rng.integers(2, 5) if long else rng.integers(0, 2))]:
        lines.append(remarks[index])
    return lines


def _impression(seen: list[PlantedFinding], style: Style, rng: np.random.Generator) -> str:
    if not seen:
        options = wordings.CT_NORMAL if style == "ct" else wordings.FILM_NORMAL
        return options[int(rng.integers(len(options)))]
    lines = [sentence(f, style, rng) for f in seen]
    if style == "ct" and len(lines) > 1:
        return " ".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
    return " ".join(lines)
