"""Keep banned phrasings out of what a person reads: README, docs, YAML comments, help, and the package's messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctx_distill.commands.main import build_app

ROOT = Path(__file__).parents[1]
THINGS = (
    "arm|batch|core|epoch|finding|GPU|host|image|job|kind|machine|node|patient|process|rank|reconstruction|regime|row"
    "|run|scan|second|seed|stage|step|study|volume"
)
COUNTED = (
    "bytes|cores|CTs|FLOP|GB|gigabytes|images|jobs|kB|keys|MB|megabytes|milliseconds|minutes|ms|pairs|passes|queries|reports|rows"
    "|samples|scans|seconds|steps|studies|TFLOP|times|tokens|volumes|X-rays"
)

# Pattern: what to write instead. They hold everywhere.
EVERYWHERE = {
    rf"\b(?:{COUNTED}) an? (?:{THINGS})\b(?! of)": "per: 'volumes per second'",
    r"\bgone on with\b": "resumed from",
    r"\bgoes on (?:from|with|where)\b": "resumes from",
    r"\bthe same command (?:goes on|finishes|ends)\b": "repeat the command to resume",
    r"\bto the bit\b": "bit-identical",
    r"\bin any company\b": "independent of the batch",
    r"\btorn (?:one|file|checkpoint|write)s?\b": "truncated or corrupt",
    r"\bmade whole\b|\bwhole again\b": "complete",
    r"\bone's own\b": "local, custom",
    r"\blearnt\b": "learned",
    r"\bwith a word\b": "with a warning",
    r"\b(?:adds|has) one a \w+": "one per",
    r"\bdigit for digit\b": "identical",
    r"\bby no means\b": "does not mean",
    r"\bits rooms\b|\bthe rooms\b": "packages, modules",
    r"\bmust be seen to\b": "must",
    r"\bbroken off\b": "interrupted",
    r"\bgot on\b|\bgets on\b": "made progress",
}

# Help and messages of ctx_distill/ still use these, so they hold for README, docs, data_manifests and YAML comments only.
# Move a line up when the package is clean.
ONLY_DOCUMENTS_YET = {
    r"\bset aside\b": "moved to NAME.before-N, quarantined",
    r"\bpassed over\b": "skipped",
    r"\bleft out\b|\bleaves out\b": "skipped, excluded",
    r"\bbit for bit\b": "bit-identical",
    r"\b(?:is|are|be) asked about\b|\basked of\b": "evaluated, queried, run on",
    r"\brun again\b": "rerun",
    r"\b(?:file|folder|value|checkpoint|row|table|page|line|figure|reason)s? (?:stands?|lies?)\b": "exists, is in, is stored in",
    r"\bstands? (?:in|beside|below|above|there)\b": "exists, is in, is stored in",
    r"\bcompare got\b": "compare needs 2 to 6 run folders; got 1",
    r"\banew\b": "again",
    r"\b(?:command|program|run|log|model|message|page|table|card|script)s? (?:says?|tells?|told)\b": "prints, reports, shows",
    r"\bfirst look\b": "preliminary result",
    r"\bgo(?:es)? by\b": "is decided by",
}


def documents() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of README, docs, data_manifests and YAML comments."""
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "data_manifests").glob("*.md")),
    ]:
        text = re.sub(
            r"<!-- (tables|results|gpu \w+).*?<!-- end of .*?-->", "", path.read_text("utf-8"), flags=re.DOTALL
        )
        # code, as it is typed or printed, is not prose; wrapped lines are one text
        text = re.sub(r"```.*?```|`[^`\n]*`", " ", text, flags=re.DOTALL)
        for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) )", text):
            yield path.relative_to(ROOT).as_posix(), " ".join(paragraph.split())
    for path in sorted((ROOT / "stages").rglob("*.yaml")):
        for line in path.read_text("utf-8").splitlines():
            if comment := re.search(r"(?:^|\s)# ?(.*)", line):
                yield path.relative_to(ROOT).as_posix(), comment[1]


def help_pages(capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, str]]:
    """Yield (command, help) of every command."""
    app = build_app()
    names = [name for name in app if not name.startswith("-")]
    assert len(names) > 20
    for name in names:
        app.help_print([name])
        yield f"ctx-distill {name} --help", re.sub(r"[\s│]+", " ", capsys.readouterr().out)


def messages() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of the string constants in errors, warnings and prints of the package."""
    for path in sorted((ROOT / "ctx_distill").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func).rpartition(".")[2]
            if name in ("warn", "print") or (name == "InputError" and isinstance(node, ast.Raise)):
                for part in ast.walk(call):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield f"{path.relative_to(ROOT).as_posix()}:{part.lineno}", part.value


def broken(texts: Iterator[tuple[str, str]], rules: dict[str, str]) -> list[str]:
    """Return one line per banned phrasing: place, phrasing, what to write instead."""
    return [
        f"{place}: {match[0]!r}; write: {instead}"
        for place, text in texts
        for pattern, instead in rules.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def test_documents_are_plain_english() -> None:
    assert broken(documents(), EVERYWHERE | ONLY_DOCUMENTS_YET) == []


def test_help_is_plain_english(capsys: pytest.CaptureFixture[str]) -> None:
    assert broken(help_pages(capsys), EVERYWHERE) == []


def test_messages_are_plain_english() -> None:
    assert broken(messages(), EVERYWHERE) == []


@pytest.mark.parametrize(
    ("text", "is_broken"),
    [
        ("It reads 3 volumes a second.", True),
        ("This is a step, and that is a run.", False),
        ("A killed run resumes when you repeat the command.", False),
        ("The same command goes on.", True),
        ("A torn one is passed over with a word", True),
    ],
)
def test_the_rules_find_what_they_are_for(text: str, is_broken: bool) -> None:
    assert bool(broken(iter([("", text)]), EVERYWHERE | ONLY_DOCUMENTS_YET)) is is_broken
