"""What is masked: tokens of a unit together, rates over many reports, special tokens never."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from ctx_distill.text.entities import EntityFinder, EntitySpan
from ctx_distill.text.extractor import load_vocabulary
from ctx_distill.text.masking import Unit, choose_units, maskable_units
from ctx_distill.text.tokenizer import train_wordpiece

TEXT = "There is a small left pleural effusion, no pneumothorax. Spine isn't bent."


def test_units_of_hand_made_tokens() -> None:
    text = "no effusions, mild."
    entities = [EntitySpan(0, 2, "cue", "cue"), EntitySpan(3, 12, "finding", "effusion")]
    offsets = [(0, 0), (0, 2), (2, 9), (9, 12), (12, 13), (13, 16), (16, 18), (18, 19), (0, 0), (0, 0)]
    special = [True, *[False] * 7, True, True]
    units = maskable_units(text, entities, offsets, special)
    assert units == [Unit((1,), True), Unit((2, 3), True), Unit((5, 6), False)]  # token 2 begins with the space
    assert maskable_units(text, entities, offsets[:3], special[:3]) == [Unit((1,), True), Unit((2,), True)]  # cut
    assert maskable_units("", [], [(0, 0)], [True]) == []


def test_all_words_of_an_entity_are_one_unit_of_a_trained_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(["abc pneumonia is here"], 60, tmp_path, 128)  # so small that every word is in pieces
    entities = EntityFinder(load_vocabulary("ct-rate")).spans(TEXT)
    out = tokenizer(TEXT, return_offsets_mapping=True, return_special_tokens_mask=True)
    units = maskable_units(TEXT, entities, out["offset_mapping"], [bool(s) for s in out["special_tokens_mask"]])
    texts = [
        (TEXT[out["offset_mapping"][unit.tokens[0]][0] : out["offset_mapping"][unit.tokens[-1]][1]], unit.entity)
        for unit in units
    ]
    assert texts == [
        ("There", False), ("is", False), ("a", False), ("small", False), ("left", False), ("pleural effusion", True),
        ("no", True), ("pneumothorax", False), ("Spine", False), ("is", False), ("n't", False), ("bent", False),
    ]  # fmt: skip
    places = [place for unit in units for place in unit.tokens]
    assert places == sorted(set(places))
    assert not any(out["special_tokens_mask"][place] for place in places)


def test_rates_and_fates_over_many_texts() -> None:
    rng = random.Random(0)
    units = [Unit((i,), i % 3 == 0) for i in range(90)]
    chosen, fates = Counter[bool](), Counter[str]()
    for _ in range(400):
        for unit, fate in choose_units(units, 0.5, 0.1, rng):
            chosen[unit.entity] += 1
            fates[fate] += 1
    assert chosen[True] / (400 * 30) == pytest.approx(0.5, abs=0.02)
    assert chosen[False] / (400 * 60) == pytest.approx(0.1, abs=0.01)
    total = sum(fates.values())
    assert [fates[fate] / total for fate in ("mask", "random", "keep")] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_at_least_one_and_an_entity_first() -> None:
    units = [Unit((1, 2), False), Unit((3,), True), Unit((4,), False)]
    for seed in range(50):
        assert choose_units(units, 1e-9, 1e-9, random.Random(seed))[0][0] == units[1]
        assert choose_units(units, 0.0, 1e-9, random.Random(seed))[0][0] != units[1]
    assert choose_units(units[1:2], 0.0, 0.5, random.Random(0)) == []
    assert choose_units([], 0.5, 0.5, random.Random(0)) == []
    assert [unit for unit, _ in choose_units(units, 1.0, 1.0, random.Random(0))] == units
