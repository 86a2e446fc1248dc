"""Writes a cohort folder: images by several processes, then the manifests, and last of all cohort.json.

    OUT/ct.csv  OUT/xray.csv  OUT/ct/*.nii.gz  OUT/xray/*.png  OUT/cohort.json

A folder without cohort.json is unfinished: the same call finishes it, and every byte comes out as if it had never
been stopped.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ctx_distill.files import write_bytes
from ctx_distill.parallel import end_with_parent
from ctx_distill.phantom.items import Modality, PhantomStudy, make_images, plan_study
from ctx_distill.phantom.planted_findings import FINDINGS
from ctx_distill.progress import progress_bar
from ctx_distill.types import InputError

GENERATOR = 1
"""Version of the generator: raised when the same seed gives other bytes."""

REQUEST = ".cohort-request.json"
DONE = "cohort.json"
_CHUNK = 5  # studies a task: a kill loses little, and the queue stays short
_ALONE = 16  # so few studies are made sooner than a pool starts


def write_cohort(out: Path, ct: int, xray: int, seed: int, workers: int | None = None) -> None:
    """Writes, or finishes, the cohort of `ct` CT studies and `xray` radiographs.

    The same parameters give the same bytes, whatever `workers` is and however often the writing was stopped. A
    finished cohort with these parameters is left as it is.

    Args:
        out: the folder; made where it is missing.
        ct: number of CT studies (about 3 % have a second reconstruction).
        xray: number of radiographs, of other people than the CTs.
        seed: at least 0.
        workers: processes; None for one a CPU core.

    Raises:
        InputError: bad numbers, a folder that holds another cohort or other data, or that another process writes.
    """
    out = Path(out)
    for name, number, least in (
        ("ct", ct, 1),
        ("xray", xray, 1),
        ("seed", seed, 0),
        ("workers", 1 if workers is None else workers, 1),
    ):
        if number < least:
            raise InputError(f"--{name} {number}: expected {least} or more. Give a larger number.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: expected a folder for the cohort. Give another path.")
    request = {"generator": GENERATOR, "seed": seed, "ct": ct, "xray": xray}
    if _finished(out, request):
        return
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".cohort.lock", timeout=0):
            if not _finished(out, request):  # another process may have finished it since
                _write(out, request, workers)
    except Timeout as error:
        raise InputError(f"{out}: another process is writing a cohort there. Wait for it, or stop it.") from error


def _write(out: Path, request: dict[str, int], workers: int | None) -> None:
    write_bytes(out / REQUEST, _json(request))
    for folder in ("ct", "xray"):
        (out / folder).mkdir(exist_ok=True)
        for left_over in (out / folder).glob(".*.part"):
            left_over.unlink(missing_ok=True)
    seed = request["seed"]
    _make_all(out, seed, request["ct"], request["xray"], workers)
    ct = [plan_study(seed, "ct", index) for index in range(request["ct"])]
    xray = [plan_study(seed, "xray", index) for index in range(request["xray"])]
    write_bytes(out / "ct.csv", _manifest(ct))
    write_bytes(out / "xray.csv", _manifest(xray))
    counts = {name: _counts(studies) for name, studies in (("ct", ct), ("xray", xray))}
    write_bytes(out / DONE, _json({**request, "counts": counts}))


def _finished(out: Path, request: dict[str, int]) -> bool:
    """Whether the whole cohort stands; raises where the folder belongs to something else."""
    for name in (DONE, REQUEST):
        path = out / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text())
            found = {key: found[key] for key in request}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a cohort's description. Remove {out} or give another folder.") from error
        if found != request:
            raise InputError(
                f"{out} holds a cohort with {_spell(found)}, asked for was {_spell(request)}. "
                "Remove that folder or give another one."
            )
        return name == DONE
    taken = [name for name in ("ct.csv", "xray.csv", "ct", "xray") if (out / name).exists()]
    if taken:
        raise InputError(
            f"{out} holds {', '.join(taken)}, which no phantom cohort left there ({REQUEST} is missing). "
            "Give another folder, so that nothing is overwritten."
        )
    return False


def _spell(request: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in request.items())


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _make_all(out: Path, seed: int, ct: int, xray: int, workers: int | None) -> None:
    """Makes the images that are missing, here or in worker processes, under a progress bar."""
    tasks: list[tuple[Modality, list[int]]] = []
    counts: tuple[tuple[Modality, int], ...] = (("ct", ct), ("xray", xray))
    for modality, count in counts:
        tasks += [(modality, list(range(at, min(at + _CHUNK, count)))) for at in range(0, count, _CHUNK)]
    with progress_bar() as progress:
        bar = progress.add_task("phantom cohort", total=ct + xray)
        processes = min(workers or len(os.sched_getaffinity(0)), len(tasks))
        if processes == 1 or (workers is None and ct + xray <= _ALONE):
            for modality, indices in tasks:
                progress.advance(bar, make_images(out, seed, modality, indices))
            return
        # spawn: the parent may hold torch's threads, which a fork does not survive
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=end_with_parent) as pool:
            pending: set[Future[int]] = {pool.submit(make_images, out, seed, *task) for task in tasks}
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        progress.advance(bar, future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _manifest(studies: list[PhantomStudy]) -> bytes:
    """The CSV of one modality, a row an image."""
    view = ["view"] if studies[0].modality == "xray" else []
    header = ["study_id", "image_id", "patient_id", "split", "image_path", "findings", "impression", *view, "language"]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*header, *(f"label:{name}" for name in FINDINGS)])
    for study in studies:
        present = {finding.name for finding in study.findings}
        labels = [int(name in present) for name in FINDINGS]
        words = [study.report.findings, study.report.impression, *(["frontal"] if view else []), "en"]
        for image_id in study.image_ids:
            row = [study.study_id, image_id, study.patient_id, study.split, study.image_path(image_id)]
            writer.writerow([*row, *words, *labels])
    return stream.getvalue().encode()


def _counts(studies: list[PhantomStudy]) -> dict[str, Any]:
    planted = [{finding.name for finding in study.findings} for study in studies]
    return {
        "studies": len(studies),
        "images": sum(len(study.image_ids) for study in studies),
        "patients": len({study.patient_id for study in studies}),
        "normal": sum(not names for names in planted),
        "findings": {name: sum(name in names for names in planted) for name in FINDINGS},
    }
