"""What is planted: the findings, how often, where, how large, and how well a radiograph shows them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctx_distill.phantom.anatomy import Person

Side = Literal["left", "right", "both", "midline"]
Place = Literal["upper", "middle", "lower", "basal", "diffuse", ""]


@dataclass(frozen=True)
class Kind:
    """What may be drawn for one finding.

    Attributes:
        sides: the sides it takes; a side named twice is drawn twice as often.
        places: the parts of the lung it takes.
        size: smallest and largest extent in mm, where a report would state one; (0, 0) where not.
        on_film: probability that a radiograph's report mentions it, large ones more often: how visible it is there.
        weight: how often it comes as an additional finding, relative to the others.
    """

    sides: tuple[Side, ...]
    places: tuple[Place, ...] = ("",)
    size: tuple[float, float] = (0.0, 0.0)
    on_film: float = 0.9
    weight: float = 1.0


_ONE: tuple[Side, ...] = ("left", "right")
_LOBES: tuple[Place, ...] = ("upper", "upper", "middle", "lower", "lower")

KINDS: dict[str, Kind] = {
    "pleural effusion": Kind(("left", "right", "both"), on_film=0.97, weight=1.5),
    "pneumothorax": Kind(_ONE, on_film=0.95, weight=0.8),
    "cardiomegaly": Kind(("midline",), on_film=0.95, weight=1.2),
    "consolidation": Kind(_ONE, _LOBES, on_film=0.95, weight=1.3),
    "atelectasis": Kind(_ONE, ("basal",), on_film=0.85, weight=1.4),
    "lung nodule": Kind(_ONE, _LOBES, (14, 27), on_film=0.5, weight=1.2),
    "lung mass": Kind(_ONE, ("upper", "upper", "lower"), (36, 64), on_film=0.95, weight=0.9),
    "ground-glass opacity": Kind(("left", "right", "both", "both"), ("diffuse", "upper", "lower"), on_film=0.5),
    "emphysema": Kind(("both",), ("upper", "diffuse"), on_film=0.75),
    "pulmonary fibrosis": Kind(("both",), ("basal",), on_film=0.85, weight=0.9),
    "pericardial effusion": Kind(("midline",), size=(8, 16), on_film=0.12, weight=0.9),
    "coronary calcification": Kind(("midline",), on_film=0.05, weight=1.2),
    "hiatal hernia": Kind(("midline",), size=(50, 84), on_film=0.6, weight=0.9),
    "lymphadenopathy": Kind(("midline",), size=(17, 32), on_film=0.25),
}
FINDINGS: tuple[str, ...] = tuple(KINDS)
"""The names of the findings: those of the label columns."""

# Pairs that come together in people more often than by chance.
_TOGETHER = {
    frozenset({"pleural effusion", "atelectasis"}): 2.5,
    frozenset({"pleural effusion", "cardiomegaly"}): 2.0,
    frozenset({"pericardial effusion", "cardiomegaly"}): 0.4,
    frozenset({"lung mass", "lymphadenopathy"}): 2.0,
    frozenset({"emphysema", "lung nodule"}): 1.6,
    frozenset({"emphysema", "pneumothorax"}): 1.6,
    frozenset({"coronary calcification", "cardiomegaly"}): 1.6,
    frozenset({"emphysema", "pulmonary fibrosis"}): 0.3,
}


@dataclass(frozen=True)
class PlantedFinding:
    """One planted finding.

    Attributes:
        name: one of `FINDINGS`.
        side: the patient's side.
        place: part of the lung, "" where it has none.
        extent: 0 (mild, small) to 1 (severe, large).
        size: diameter or thickness in mm where a report would state it, else 0.
        seed: seed of its exact position and texture.
    """

    name: str
    side: Side
    place: Place
    extent: float
    size: float
    seed: int


BLOCK = 20
NORMALS = BLOCK - len(FINDINGS)


def sample_findings(seed: int, kind: int, index: int, rng: np.random.Generator) -> list[PlantedFinding]:
    """Draws the findings of one study; an empty list is a normal study.

    Of every `BLOCK` studies in a row `NORMALS` are normal and each finding leads one of the others, in an order drawn
    for the block, so that also a small cohort has examples of everything. Up to three more findings join the first.

    Args:
        seed: the cohort's seed.
        kind: number of the modality, so that CTs and radiographs draw apart from one another.
        index: number of the study in the cohort.
        rng: the study's own generator, for everything but the block's order.
    """
    order = np.random.default_rng(np.random.SeedSequence([seed, kind, 1, index // BLOCK])).permutation(BLOCK)
    slot = int(order[index % BLOCK])
    if slot >= len(FINDINGS):
        return []
    names = [FINDINGS[slot]]
    for _ in range(int(rng.choice(4, p=[0.2, 0.3, 0.3, 0.2]))):
        rest = [name for name in FINDINGS if name not in names]
        weights = np.array([KINDS[name].weight for name in rest])
        for place, name in enumerate(rest):
            for present in names:
                weights[place] *= _TOGETHER.get(frozenset({name, present}), 1.0)
        names.append(rest[int(rng.choice(len(rest), p=weights / weights.sum()))])
    return [draw_finding(name, rng) for name in sorted(names, key=FINDINGS.index)]


def draw_finding(name: str, rng: np.random.Generator) -> PlantedFinding:
    """Draws side, place, extent and size of the finding `name`."""
    kind = KINDS[name]
    side = kind.sides[int(rng.integers(len(kind.sides)))]
    place = kind.places[int(rng.integers(len(kind.places)))]
    if place == "middle" and side == "left":
        place = "upper"  # the left lung has no middle lobe
    extent = float(rng.uniform())
    size = kind.size[0] + extent * (kind.size[1] - kind.size[0])
    return PlantedFinding(name, side, place, extent, float(np.round(size)), int(rng.integers(2**31)))


def adapt(person: Person, findings: list[PlantedFinding]) -> Person:
    """The person with those findings that change the anatomy itself; lesions are painted later."""
    for finding in findings:
        e = finding.extent
        if finding.name == "cardiomegaly":
            person = dataclasses.replace(person, heart_scale=person.heart_scale * (1.22 + 0.22 * e))
        elif finding.name == "emphysema":
            person = dataclasses.replace(
                person,
                lung_hu=max(person.lung_hu - 45 - 40 * e, -965.0),
                vessel_gain=person.vessel_gain * (0.78 - 0.15 * e),
                dome_right=person.dome_right - 10 - 8 * e,
                dome_left=person.dome_left - 10 - 8 * e,
                lung_base=person.lung_base - 6 - 6 * e,
                dome_drop=person.dome_drop * (0.62 - 0.17 * e),
            )
        elif finding.name == "atelectasis":
            rise = (16 + 20 * e) * person.scale
            if finding.side == "left":
                person = dataclasses.replace(person, dome_left=person.dome_left + rise)
            else:
                person = dataclasses.replace(person, dome_right=person.dome_right + rise)
        elif finding.name == "pulmonary fibrosis":
            loss = (8 + 10 * e) * person.scale
            person = dataclasses.replace(person, dome_left=person.dome_left + loss, dome_right=person.dome_right + loss)
    return person
