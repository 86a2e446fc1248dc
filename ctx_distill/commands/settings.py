"""`ctx-distill settings`."""

from __future__ import annotations


def settings(stage: str, preset: str = "demo", /, *, markdown: bool = False) -> None:
    """Print every override of a stage: type, default, choices and one line of explanation.

    Args:
        stage: A stage, or `all` for the page of all stages, which is always Markdown.
        preset: Preset that the defaults are taken from: `demo`, `base`, `large`, or a YAML file.
        markdown: Print a Markdown table.
    """
    from ctx_distill.runs.stage_settings import settings_markdown, settings_page, settings_text, stage_named

    if stage == "all":
        print(settings_page(), end="")
    elif markdown:
        print(settings_markdown([stage_named(stage)], preset), end="")
    else:
        print(settings_text(stage_named(stage), preset))
