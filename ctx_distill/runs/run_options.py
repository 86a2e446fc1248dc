"""The options that every stage command shares. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunOptions:
    """What the stages of a run read and where they write.

    Attributes:
        data: Folder that holds `ct.csv` and `xray.csv` (or `.parquet`).
        run: Run folder. Each stage writes to its own folder in it.
        preset: Sizes and settings: `demo`, `base`, `large`, or a YAML file.
        expert: X-ray expert: a folder or `hf-hub:org/name`. Default: the expert stage of this run.
    """

    data: Path = Path("runs/demo/data")
    run: Path = Path("runs/demo")
    preset: str = "demo"
    expert: str | None = None

    def arguments(self) -> list[str]:
        """Return the options as command-line arguments, with absolute paths."""
        preset = str(Path(self.preset).resolve()) if self.preset.endswith((".yaml", ".yml")) else self.preset
        given = ["--data", str(self.data.resolve()), "--run", str(self.run.resolve()), "--preset", preset]
        if self.expert:
            given += ["--expert", str(Path(self.expert).resolve()) if Path(self.expert).is_dir() else self.expert]
        return given
