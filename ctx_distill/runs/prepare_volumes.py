"""`ctx-distill prepare`: write the prepared volumes of a manifest, in parallel; a stopped command resumes."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.loading.prepared import PreparedFolder
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.data.transforms.volume_presets import VOLUME_PRESETS
from ctx_distill.errors import InputError
from ctx_distill.files import write_text
from ctx_distill.parallel import DIED, in_processes
from ctx_distill.runs.stage_table import STAGES, stage_config


def preset_volume(preset: str) -> tuple[VolumeSpec, bool]:
    """Return the volume spec of a preset or of a published model, in the stored type, and whether it needs projections."""
    if preset in VOLUME_PRESETS:
        return replace(VOLUME_PRESETS[preset], stored="int16"), False
    data = stage_config(STAGES["align"], preset)["data"]["init_args"]
    return replace(VolumeSpec.from_config(data["volume"]), stored="int16"), bool(data.get("projection", False))


def array_part(text: str | None) -> tuple[int, int]:
    """Return i and n of `i/n`, i from 0; by default those of this task of a SLURM array, else 0 and 1.

    Raises:
        InputError: the text is not of this form, or i is not below n.
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
    """Prepare every image of a manifest that is not prepared yet.

    Args:
        manifest_path: manifest of CTs.
        out: the prepared folder.
        preset: name or path of the preset whose volume spec is used.
        workers: processes; None takes one per core.
        array: `i/n`: every n-th image from the i-th.

    Returns:
        The counts, for a message.

    Raises:
        InputError: a wrong argument; a full disk; unreadable scans, which are listed in OUT/failed.<i>.csv after all
            others are prepared.
    """
    spec, projection = preset_volume(preset)
    manifest = read_manifest(manifest_path)
    part, parts = array_part(array)
    try:
        folder = PreparedFolder.create(out, spec, projection, preset)
    except OSError as error:
        raise _cannot_write(out, error) from error
    images = [
        (str(manifest.frame.at[row, "image_id"]), manifest.scan_file(int(row)))
        for row in list(manifest.frame.index)[part::parts]
    ]
    failed: list[tuple[str, str, str]] = []
    counts = {"prepared": 0, "kept": 0}
    work = partial(_prepare_one, folder)
    for (image_id, source), result in in_processes(
        f"preparing, {preset}", work, images, len(images), workers, died=_died
    ):
        if result in counts:
            counts[result] += 1
        else:
            failed.append((image_id, str(source.path), result))
    report = out / f"failed.{part}.csv"
    report.unlink(missing_ok=True)
    summary = f"{counts['prepared']} prepared, {counts['kept']} already there, {len(failed)} failed, of {len(images)}"
    if failed:
        table = pd.DataFrame(failed, columns=["image_id", "path", "reason"])
        write_text(report, table.to_csv(index=False, lineterminator="\n"))
        raise InputError(f"{manifest_path}: {summary}; {report} lists the reasons. First: {failed[0][2]}")
    return f"{out}: {summary}"


def _died(image: tuple[str, ScanFile]) -> str:
    return f"{image[1].path}: the process that read it {DIED}"


def _prepare_one(folder: PreparedFolder, image: tuple[str, ScanFile]) -> str:
    image_id, source = image
    try:
        if folder.is_complete(image_id, source):
            return "kept"
        folder.write(image_id, source)
    except InputError as error:
        return str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise _cannot_write(folder.folder, error) from error
        return f"{source.path}: {error}"
    return "prepared"


def _cannot_write(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"{folder}: cannot be written ({error.strerror}); the volumes prepared so far stay valid. Free some space, and repeat"
        " the command."
    )
