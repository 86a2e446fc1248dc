"""Select words and entities for masked language modelling.

BERT's scheme (Devlin et al. 2019, arXiv 1810.04805: 80 % of the selection becomes the mask token, 10 % a random token,
10 % is unchanged) is applied to units, which are entities or other words. All tokens of a unit are treated alike, as in
SpanBERT (Joshi et al. 2020, arXiv 1907.10529), so that a visible part does not reveal the rest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctx_distill.text.entities import EntitySpan
from ctx_distill.text.phrases import word_spans

Fate = Literal["mask", "random", "keep"]


@dataclass(frozen=True)
class Unit:
    """Tokens that are selected together.

    Attributes:
        tokens: positions in the token sequence.
        entity: whether the unit is an entity rather than another word.
    """

    tokens: tuple[int, ...]
    entity: bool


def maskable_units(
    text: str, entities: Sequence[EntitySpan], offsets: Sequence[Sequence[int]], special: Sequence[bool]
) -> list[Unit]:
    """Return entities and the words outside them as tokens, in order.

    Args:
        text: tokenised text.
        entities: entities of the text, in order and without overlap.
        offsets: L pairs, first and one past the last character of each token.
        special: L, true for special tokens and padding, which belong to no unit.

    Returns:
        Units with at least one token; punctuation belongs to a unit only within an entity (**ours**).
    """
    regions = [(entity.start, entity.end, True) for entity in entities]
    for start, end in word_spans(text):
        inside = any(entity.start < end and start < entity.end for entity in entities)
        if text[start].isalnum() and not inside:
            regions.append((start, end, False))
    regions.sort()
    members: list[list[int]] = [[] for _ in regions]
    current = 0
    for position, ((start, end), mark) in enumerate(zip(offsets, special, strict=True)):
        if mark or end <= start:
            continue
        while current < len(regions) and regions[current][1] <= start:
            current += 1
        if current < len(regions) and regions[current][0] < end:
            members[current].append(position)
    return [Unit(tuple(tokens), region[2]) for tokens, region in zip(members, regions) if tokens]


def choose_units(
    units: Sequence[Unit], entity_rate: float, word_rate: float, rng: random.Random
) -> list[tuple[Unit, Fate]]:
    """Select the units to predict and their replacement.

    Args:
        units: units of one text.
        entity_rate: probability of selecting an entity.
        word_rate: probability of selecting another word.
        rng: random source.

    Returns:
        Selected units in order: at least one (preferably an entity), unless there are none with a positive rate.
    """
    rates = [entity_rate if unit.entity else word_rate for unit in units]
    chosen = [unit for unit, rate in zip(units, rates) if rng.random() < rate]
    if not chosen:
        able = [unit for unit, rate in zip(units, rates) if rate]
        able = [unit for unit in able if unit.entity] or able
        chosen = [rng.choice(able)] if able else []
    return [(unit, _fate(rng.random())) for unit in chosen]


def _fate(draw: float) -> Fate:
    if draw < 0.8:
        return "mask"
    return "random" if draw < 0.9 else "keep"
