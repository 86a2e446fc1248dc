"""Reports: what is planted is said, what is denied is absent, and the shipped vocabulary reads both."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

import ctx_distill
from ctx_distill.phantom import wordings
from ctx_distill.phantom.planted_findings import FINDINGS, KINDS, draw_finding, sample_findings
from ctx_distill.phantom.reports import Style, sentence, write_report
from ctx_distill.text.extractor import extract, load_vocabulary

VOCABULARY = yaml.safe_load(
    (Path(ctx_distill.__file__).parent / "text" / "vocabularies" / "phantom.yaml").read_text(encoding="utf-8")
)["findings"]


def named(text: str) -> set[str]:
    """The findings that a text names, by the longest term at each place."""
    terms = [(term, name) for name, entry in VOCABULARY.items() for term in entry["synonyms"]]
    found = set()
    text = text.lower()
    for term, name in sorted(terms, key=lambda pair: -len(pair[0])):
        text, count = re.subn(rf"\b{re.escape(term)}s?\b", " # ", text)
        if count:
            found.add(name)
    return found


def test_vocabulary_names_are_the_label_columns() -> None:
    assert list(VOCABULARY) == list(FINDINGS)


def test_the_vocabulary_says_what_the_generator_shows_on_a_film() -> None:
    vocabulary = load_vocabulary("phantom")
    assert vocabulary.visible_on_xray.tolist() == [KINDS[name].on_film >= 0.5 for name in vocabulary.names]
    assert 0 < vocabulary.visible_on_xray.sum() < len(FINDINGS)


@pytest.mark.parametrize("style", ["ct", "xray"])
@pytest.mark.parametrize("name", FINDINGS)
def test_every_wording_names_its_finding_and_no_other(name: str, style: Style) -> None:
    said = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        finding = draw_finding(name, rng)
        line = sentence(finding, style, rng)
        said.add(line)
        assert "{" not in line
        assert line.endswith(".")
        assert named(line) == {name}, line
        for other in {"left", "right"} - {finding.side}:
            assert not re.search(rf"\b{other}\b(?! ventricle)", line.lower()), line
    assert len(said) >= 4


def test_every_denial_is_read_as_absent() -> None:
    vocabulary = load_vocabulary("phantom")
    for name in FINDINGS:
        for line in wordings.ABSENT[name]:
            assert re.search(r"\b(no|not|without)\b", line.lower())
            assert extract(line, vocabulary)[name] == 0, line
    for first, second, line in wordings.PAIRS:
        assert extract(line, vocabulary)[first] == 0, line
        assert extract(line, vocabulary).get(second, 0) == 0, line
    for rules_out, *styles in wordings.NORMAL:
        for line in (line for lines in styles for line in lines):
            read = extract(line, vocabulary)
            assert 1 not in read.values(), line
            assert set(read) <= rules_out, line
    for line in (*wordings.CT_FILLER, *wordings.FILM_FILLER, *wordings.CT_NORMAL, *wordings.FILM_NORMAL):
        assert not named(line), line


@pytest.mark.parametrize("style", ["ct", "xray"])
def test_extractor_reads_the_planted_findings(style: Style) -> None:
    vocabulary = load_vocabulary("phantom")
    agreed = said = 0
    for index in range(150):
        rng = np.random.default_rng(index)
        planted = sample_findings(5, 1, index, rng)
        report = write_report(planted, style, False, rng)
        truth = {finding.name for finding in planted}
        assert set(report.mentioned) <= truth
        if style == "ct":
            assert set(report.mentioned) == truth
        assert report.findings or report.impression
        read = extract(f"{report.findings} {report.impression}", vocabulary)
        affirmed = {name for name, value in read.items() if value != 0}
        assert affirmed <= truth, (affirmed - truth, report)
        assert affirmed == set(report.mentioned), (affirmed ^ set(report.mentioned), report)
        said += len(report.mentioned)
        agreed += sum(read.get(name) == 1 for name in report.mentioned)
    # the rest is worded with doubt ("suggesting ...")
    assert agreed > (0.97 if style == "ct" else 0.8) * said


def test_sections_lengths_and_visibility() -> None:
    reports = {style: [] for style in ("ct", "xray")}
    mentioned = dict.fromkeys(FINDINGS, 0)
    planted_count = dict.fromkeys(FINDINGS, 0)
    for style, kept in reports.items():
        for index in range(400):
            rng = np.random.default_rng([index, len(style)])
            planted = sample_findings(9, 2, index, rng)
            kept.append(write_report(planted, style, True, rng))  # type: ignore[arg-type]
            if style == "xray":
                for finding in planted:
                    planted_count[finding.name] += 1
                    mentioned[finding.name] += finding.name in kept[-1].mentioned
    length = {style: np.mean([len(r.findings) for r in kept]) for style, kept in reports.items()}
    assert length["ct"] > 1.5 * length["xray"]
    for kept in reports.values():
        assert 0.005 < np.mean([not r.findings for r in kept]) < 0.07
        assert 0.03 < np.mean([not r.impression for r in kept]) < 0.3
    for name in FINDINGS:
        assert mentioned[name] / planted_count[name] == pytest.approx(KINDS[name].on_film, abs=0.22)
