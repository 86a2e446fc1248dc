"""The ablation's page: its tables and plots in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from ctx_distill.files import write_text
from ctx_distill.reporting.run_page import TEMPLATES
from ctx_distill.run_files import PAGE

Table = tuple[str, str, Sequence[Sequence[str]]]


def build_ablation_page(run: Path, facts: Mapping[str, str], tables: Sequence[Table]) -> Path:
    """Write `RUN/index.html`.

    Args:
        run: The ablation's folder.
        facts: What was run, by name.
        tables: Title, inline SVG (or ""), and rows with the header first.

    Returns:
        The page's path.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    sections = [(title, Markup(picture), rows) for title, picture, rows in tables]
    path = run / PAGE
    write_text(path, environment.get_template("ablation.html.j2").render(style=style, facts=facts, tables=sections))
    return path
