"""`ctx-distill prepare`: the volumes of a manifest into their prepared form, in parallel, to go on where it was stopped."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pandas as pd
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ctx_distill.data.manifest import read_manifest
from ctx_distill.data.prepared import PreparedFolder
from ctx_distill.data.transforms import VolumeSpec
from ctx_distill.errors import InputError
from ctx_distill.files import write_text
from ctx_distill.pipeline.plan import STAGES, stage_config


def preset_volume(preset: str) -> tuple[VolumeSpec, bool]:
    """The volume spec of a preset, rounded to the stored type, and whether it asks for projections."""
    data = stage_config(STAGES["align"], preset)["data"]["init_args"]
    return replace(VolumeSpec.from_config(data["volume"]), stored="int16"), bool(data.get("projection", False))


def array_part(text: str | None) -> tuple[int, int]:
    """`i/n`, i from 0; by default the part of this task of a SLURM array, else the whole.

    Raises:
        InputError: no such part.
    """
    if text is None:
        task, count = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_ARRAY_TASK_COUNT")
        low = int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0))
        return (int(task) - low, int(count)) if task and count else (0, 1)
    number, _, count = text.partition("/")
    if not (number.isdecimal() and (count or "").isdecimal() and int(number) < int(count or 0)):
        raise InputError(f"--array {text}: expected i/n with i from 0 to n - 1, such as 0/8.")
    return int(number), int(count or 1)


def prepare_manifest(manifest_path: Path, out: Path, preset: str, workers: int | None, array: str | None) -> str:
    """Prepare every image of a manifest that does not stand prepared yet.

    Args:
        manifest_path: of CTs.
        out: the prepared folder.
        preset: name or path of the preset whose volume spec is taken.
        workers: processes; None takes one a core.
        array: `i/n`: every n-th image from the i-th.

    Returns:
        The counts, as a sentence.

    Raises:
        InputError: a wrong argument; a full disk; scans that cannot be read, which are listed in OUT/failed.<i>.csv
            while all others are prepared.
    """
    spec, projection = preset_volume(preset)
    manifest = read_manifest(manifest_path)
    part, parts = array_part(array)
    folder = PreparedFolder.create(out, spec, projection)
    images = [
        (str(manifest.frame.at[row, "image_id"]), manifest.image_file(int(row)))
        for row in list(manifest.frame.index)[part::parts]
    ]
    failed: list[tuple[str, str, str]] = []
    counts = {"prepared": 0, "stood": 0}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns) as progress:
        bar = progress.add_task(f"preparing, {preset}", total=len(images))
        for image_id, source, result in _results(folder, images, workers or len(os.sched_getaffinity(0))):
            if result in counts:
                counts[result] += 1
            else:
                failed.append((image_id, str(source), result))
            progress.advance(bar)
    report = out / f"failed.{part}.csv"
    report.unlink(missing_ok=True)
    told = f"{counts['prepared']} prepared, {counts['stood']} stood already, {len(failed)} failed, of {len(images)}"
    if failed:
        table = pd.DataFrame(failed, columns=["image_id", "path", "reason"])
        write_text(report, table.to_csv(index=False, lineterminator="\n"))
        raise InputError(f"{manifest_path}: {told}; {report} says why. First: {failed[0][2]}")
    return f"{out}: {told}"


def _results(folder: PreparedFolder, images: list[tuple[str, Path]], workers: int) -> Iterator[tuple[str, Path, str]]:
    """Each image with `prepared`, `stood` or why not; a bounded number is in flight."""
    waiting = iter(images)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_calm) as pool:
        try:
            running: dict[Future[str], tuple[str, Path]] = {}
            while True:
                for image_id, source in islice(waiting, 4 * workers - len(running)):
                    running[pool.submit(_prepare_one, folder, image_id, source)] = (image_id, source)
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield *running.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _calm() -> None:
    import torch

    torch.set_num_threads(1)


def _prepare_one(folder: PreparedFolder, image_id: str, source: Path) -> str:
    try:
        if folder.is_complete(image_id, source):
            return "stood"
        folder.write(image_id, source)
    except InputError as error:
        return str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise InputError(
                f"{folder.folder}: cannot be written ({error.strerror}); what is prepared stays valid. Make room, and give the"
                " same command again."
            ) from error
        return f"{source}: {error}"
    return "prepared"
