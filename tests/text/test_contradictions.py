"""Labels against texts, and texts in a language that is not read."""

from __future__ import annotations

import pytest

from ctx_distill.errors import InputError
from ctx_distill.text.contradictions import Contradiction, compare, label_value
from ctx_distill.text.familiarity import is_foreign


def test_only_a_denied_one_and_an_asserted_zero_contradict() -> None:
    nan = float("nan")
    labels = {"a": [1, 0, 1, 0, -1, None, 1, nan, 1], "b": [0] * 9}
    read = [{"a": 0}, {"a": 1}, {"a": 1}, {"a": 0}, {"a": 1}, {"a": 1}, {}, {"a": 0}, {"a": -1, "b": 1}]
    found = compare(labels, read)
    assert found.contradictions == (
        Contradiction(0, "a", 1, 0),
        Contradiction(1, "a", 0, 1),
        Contradiction(8, "b", 0, 1),
    )
    assert (found.compared, found.unmentioned) == (5, 1)


def test_cells_of_labels() -> None:
    assert [label_value("x", cell) for cell in ("1", "0.0", "-1", "", " nan ")] == [1, 0, -1, None, None]
    with pytest.raises(InputError, match="'yes'; expected a label"):
        label_value("in.csv, row 2", "yes")


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("Trakea ve her iki ana bronş açık. Mediastende patolojik boyutta lenf nodu izlenmedi.", True),
        ("Silueta cardiaca de tamano normal. No se observan infiltrados ni derrame pleural.", True),
        ("Kein Pleuraerguss. Herz normal gross. Keine Infiltrate.", True),
        ("Heart size and mediastinal contours are within normal limits. No focal consolidation.", False),
        ("Trachea, both main bronchi are open. No occlusive pathology was detected in the trachea.", False),
        ("Derrame pleural.", False),
        ("", False),
    ],
)
def test_other_languages_are_noticed(text: str, foreign: bool) -> None:
    assert is_foreign(text) is foreign
