"""What of a text is masked for masked language modelling: whole words and whole entities, entities more often.

BERT's scheme (Devlin et al. 2019, arXiv 1810.04805: of what is chosen, 80 % becomes the mask token, 10 % a random
token, 10 % stays) over units: an entity or another word, all tokens of which share one fate, as SpanBERT does with its
spans (Joshi et al. 2020, arXiv 1907.10529), so that a visible half does not give the other away.
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
    """Tokens that are chosen together.

    Attributes:
        tokens: their positions in the token sequence.
        entity: whether they are an entity, or any other word.
    """

    tokens: tuple[int, ...]
    entity: bool


def maskable_units(
    text: str, entities: Sequence[EntitySpan], offsets: Sequence[Sequence[int]], special: Sequence[bool]
) -> list[Unit]:
    """Entities and the words outside them, as tokens, in order.

    Args:
        text: what was tokenised.
        entities: of the text, in order and without overlap.
        offsets: L pairs, first and one past the last character of each token.
        special: L, true at marks and padding, which belong to no unit.

    Returns:
        Units with at least one token; a punctuation mark belongs to one only inside an entity (**ours**).
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
    """Units to be predicted, and what is put in their place.

    Args:
        units: of one text.
        entity_rate: probability that an entity is chosen.
        word_rate: probability that another word is chosen.
        rng: what is drawn from.

    Returns:
        Chosen units in order. At least one where there is any (an entity, if there is one), unless the rates of the
        units there are 0.
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
