"""`ctx-distill findings`."""

from __future__ import annotations

from pathlib import Path


def findings(
    source: Path,
    out: Path,
    /,
    *,
    vocabulary: str = "ct-rate",
    prefix: str = "",
    sides: bool = False,
    workers: int | None = None,
) -> None:
    """Extract the findings of a table of reports into columns.

    Args:
        source: CSV or Parquet with a column `report_text`, or `findings` and `impression`.
        out: The same table with one column per finding: 1, 0, -1 (uncertain) or blank.
        vocabulary: `ct-rate`, `chexpert`, `phantom`, or a YAML file.
        prefix: Prefix of the columns' names, such as `label:`.
        sides: Also write `side:<finding>`: left, right or both.
        workers: Processes. Default: one per core.
    """
    print(f"reading {source} ...", flush=True)
    from ctx_distill.text.findings_table import write_findings

    print(write_findings(source, out, vocabulary, prefix, sides, workers))
