"""The command line, with stage 1 watched: each rank notes the rows that it embeds, and dies at the row that the test names.

WATCH_FOLDER holds `rows-<rank>`, one manifest row per line. With WATCH_LIMIT, a number per rank, the last for all further ones,
a rank ends as a killed process does, in the first batch after that many rows.
"""

import functools
import os
import sys
from pathlib import Path

from ctx_distill.commands.main import main
from ctx_distill.distributed import rank
from ctx_distill.stages.index.task import IndexTask


def watch() -> None:
    """Put the notes in front of `IndexTask.predict_step`."""
    step, limits, seen = IndexTask.predict_step, os.environ.get("WATCH_LIMIT", "1000000").split(","), 0

    @functools.wraps(step)
    def watched(self, batch, batch_idx):
        nonlocal seen
        if seen >= int(limits[min(rank(), len(limits) - 1)]):
            os._exit(137)
        seen += len(batch.row)
        with (Path(os.environ["WATCH_FOLDER"]) / f"rows-{rank()}").open("a") as notes:
            notes.writelines(f"{row}\n" for row in batch.row.tolist())
        return step(self, batch, batch_idx)

    IndexTask.predict_step = watched


if __name__ == "__main__":
    watch()
    sys.exit(main())
