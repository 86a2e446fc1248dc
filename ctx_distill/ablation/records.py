"""The rows of the ablation, appended as runs end and read by later runs, so that no run is repeated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ctx_distill.ablation.execute import JobScore
from ctx_distill.ablation.plan import AblationJob
from ctx_distill.errors import InputError
from ctx_distill.files import write_text

ROWS, REPLICATES, SELECTION = "ablation.csv", "replicates.csv", "selection.csv"
ROW_COLUMNS = ("arm", "seed", "metric", "value", "regime", "learning_rate", "config", "data")
SELECTION_COLUMNS = ("arm", "learning_rate", "seed", "macro_auroc", "config", "data")
_KEY = ["regime", "arm", "seed"]


@dataclass
class Records:
    """The tables of one folder.

    Attributes:
        folder: contains `ablation.csv` (one row per metric), `replicates.csv` (one row per run: the macro AUROC for each
            resampling of the test patients) and `selection.csv` (one row per run on `val`).
        rows: content of `ablation.csv`.
        replicates: content of `replicates.csv`.
        selection: content of `selection.csv`.
    """

    folder: Path
    rows: pd.DataFrame
    replicates: pd.DataFrame
    selection: pd.DataFrame

    @classmethod
    def open(cls, folder: Path) -> Records:
        """Read the tables; they are empty if the folder is empty or missing.

        Raises:
            InputError: a table lacks a column.
        """
        empty = {
            ROWS: ROW_COLUMNS,
            REPLICATES: ("regime", "arm", "seed", "config", "data"),
            SELECTION: SELECTION_COLUMNS,
        }
        tables = {}
        for name, columns in empty.items():
            path = folder / name
            kinds = dict.fromkeys(("arm", "regime", "metric", "config", "data"), str)
            table = pd.read_csv(path, dtype=kinds) if path.is_file() else pd.DataFrame(columns=list(columns))
            if missing := [column for column in columns if column not in table.columns]:
                raise InputError(
                    f"{path}: missing columns {', '.join(missing)}; remove the file or correct its header."
                )
            tables[name] = table
        return cls(folder, tables[ROWS], tables[REPLICATES], tables[SELECTION])

    def has(self, job: AblationJob, config: str) -> bool:
        """Return whether the tables contain a run of this arm, regime and seed with this configuration."""
        if job.select:
            same = (self.selection["config"] == config) & (self.selection["arm"] == job.arm.name)
            return bool((same & (self.selection["learning_rate"] == job.learning_rate)).any())
        rows = self.replicates
        return bool(
            ((rows["config"] == config) & (rows["arm"] == job.arm.name) & (rows["regime"] == job.regime.name)
             & (rows["seed"] == job.seed)).any()
        )  # fmt: skip

    def add(self, job: AblationJob, config: str, score: JobScore) -> None:
        """Append a run and write the tables; an older run of the same arm, regime and seed is replaced."""
        if job.select:
            row = [job.arm.name, job.learning_rate, job.seed, score.metrics["macro_auroc"], config, score.data]
            table = pd.DataFrame([row], columns=list(SELECTION_COLUMNS))
            self.selection = _replace(self.selection, table, ["arm", "learning_rate"])
            _write(self.folder / SELECTION, self.selection)
            return
        common = {
            "arm": job.arm.name,
            "seed": job.seed,
            "regime": job.regime.name,
            "config": config,
            "data": score.data,
        }
        rows = [
            {**common, "metric": name, "value": round(value, 5), "learning_rate": job.learning_rate}
            for name, value in score.metrics.items()
        ]
        self.rows = _replace(self.rows, pd.DataFrame(rows)[list(ROW_COLUMNS)], _KEY)
        values = {f"r{number}": f"{value:.4f}" for number, value in enumerate(score.replicates)}
        self.replicates = _replace(self.replicates, pd.DataFrame([{**common, **values}]), _KEY)
        _write(self.folder / ROWS, self.rows)
        _write(self.folder / REPLICATES, self.replicates)

    def rates(self) -> dict[str, float]:
        """Return the learning rate with the highest macro AUROC on `val` per arm; of equal ones the smaller."""
        table = self.selection.sort_values(["macro_auroc", "learning_rate"], ascending=[False, True])
        first = table.drop_duplicates("arm")
        return dict(zip(first["arm"], first["learning_rate"].astype(float), strict=True))

    def values(self, regime: str, arm: str, metric: str = "macro_auroc") -> dict[int, float]:
        """Return a metric by seed."""
        rows = self.rows
        chosen = rows[(rows["regime"] == regime) & (rows["arm"] == arm) & (rows["metric"] == metric)]
        return {int(seed): float(value) for seed, value in zip(chosen["seed"], chosen["value"], strict=True)}

    def resampled(self, regime: str, arm: str) -> dict[int, NDArray[np.float64]]:
        """Return the macro AUROC for the resampled test patients (R,) by seed."""
        rows = self.replicates
        chosen = rows[(rows["regime"] == regime) & (rows["arm"] == arm)]
        columns = [name for name in rows.columns if name[:1] == "r" and name[1:].isdigit()]
        return {
            int(seed): row.astype(np.float64)
            for seed, row in zip(chosen["seed"], chosen[columns].to_numpy(), strict=True)
        }


def _replace(table: pd.DataFrame, rows: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """Append rows to the table and drop its rows with the same key."""
    if not len(table):
        return rows
    old = table.set_index(key).index.isin(rows.set_index(key).index)
    return pd.concat([table[~old], rows], ignore_index=True)


def _write(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
