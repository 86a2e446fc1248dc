"""Checkpoint files: proved before they take their place, skipped where corrupt, refused where they are another run's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctx_distill.distributed import rank
from ctx_distill.errors import InputError
from ctx_distill.training.callbacks import random_state
from ctx_distill.training.callbacks.checkpoint_files import LAST, OWN, PREVIOUS, part_of, read, settle, standing
from ctx_distill.training.callbacks.checkpoints import Checkpoints, _WriteErrors

IDENTITY = {"stage": "DistillationTask", "request": "abc"}


def write(path: Path, step: int, identity: dict[str, str] = IDENTITY) -> None:
    content = {"global_step": step, "state_dict": {"a": torch.full((100,), float(step))}, OWN: {"identity": identity}}
    torch.save(content, part_of(path))
    settle(path, keep=path.with_name(PREVIOUS))


def test_the_one_before_is_kept(tmp_path: Path) -> None:
    assert standing(tmp_path, IDENTITY) is None
    for step in (5, 10, 15):
        write(tmp_path / LAST, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]
    found = standing(tmp_path, IDENTITY)
    assert found is not None
    assert (found.path.name, found.step) == (LAST, 15)
    assert read(tmp_path / PREVIOUS)["global_step"] == 10


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    path = tmp_path / LAST
    write(path, 5)
    write(path, 10)
    content = bytearray(path.read_bytes())
    if damage == "flipped":  # one bit inside the tensor's bytes: still a zip that opens
        place = bytes(content).index(torch.full((100,), 10.0).numpy().tobytes())
        content[place + 17] ^= 4
    path.write_bytes({"cut": content[:-200], "flipped": content, "empty": b"", "gone": b""}[damage])
    if damage == "gone":  # killed between the two renames
        path.unlink()
    found = standing(tmp_path, IDENTITY)
    assert found is not None
    assert (found.path.name, found.step) == (PREVIOUS, 5)
    assert ("skipped" in capsys.readouterr().out) == (damage != "gone")


def test_what_cannot_be_read_back_does_not_take_the_place(tmp_path: Path) -> None:
    path = tmp_path / LAST
    write(path, 5)
    part_of(path).write_bytes(path.read_bytes()[:-300])
    with pytest.raises(
        InputError, match=r"last\.ckpt: the checkpoint cannot be read back .* the previous one is unchanged"
    ):
        settle(path, keep=tmp_path / PREVIOUS)
    assert [item.name for item in tmp_path.iterdir()] == [LAST]
    assert read(path)["global_step"] == 5


@pytest.mark.parametrize(
    "identity", [{"stage": "AlignmentTask", "request": "abc"}, {"stage": "DistillationTask", "request": "x"}]
)
def test_another_stage_s_or_request_s_is_refused_by_name(tmp_path: Path, identity: dict[str, str]) -> None:
    write(tmp_path / LAST, 5, identity)
    differing = next(value for name, value in identity.items() if IDENTITY[name] != value)
    with pytest.raises(
        InputError, match=rf"last\.ckpt: a checkpoint of (stage|request) {differing}, but this run is of"
    ):
        standing(tmp_path, IDENTITY)
    assert (tmp_path / LAST).is_file()


def test_a_pickled_object_is_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Shell:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"global_step": 1, "thing": Shell()}, tmp_path / LAST)
    assert standing(tmp_path, IDENTITY) is None
    assert not (tmp_path / "ran").exists()
    assert "skipped" in capsys.readouterr().out


def test_a_full_disk_is_a_clear_error_that_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / LAST
    write(path, 5)

    def fill_the_disk() -> None:
        with _WriteErrors(path, 7, 5):
            part_of(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        InputError, match=r"step 7 cannot be written \(No space left on device\); the latest is of step 5"
    ):
        fill_the_disk()
    assert [item.name for item in tmp_path.iterdir()] == [LAST]


def test_random_states_come_back_through_weights_only(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [
            float(torch.rand(())),
            random.random(),
            random.gauss(0, 1),
            float(np.random.rand()),
            float(np.random.randn()),
        ]

    draw()  # a cached Gaussian is part of the state
    torch.save(random_state.capture(), tmp_path / "state.pt")
    first = draw()
    draw()
    random_state.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


class Alone:
    """A trainer as far as a checkpoint needs it."""

    global_step, loggers = 7, ()

    def __init__(self) -> None:
        self.is_global_zero = rank() == 0

    def save_checkpoint(self, path: Path) -> None:
        if self.is_global_zero:
            path.write_bytes(b"half a checkpoint")


def rank_of_a_bad_checkpoint(folder: str) -> list[str]:
    """What each rank says of a checkpoint that rank 0 cannot read back, and of a resume at different steps."""
    callback = Checkpoints(Path(folder), 15.0, IDENTITY)
    told = []
    for step in (5, 5 * rank()):
        callback._saved_step = step
        try:
            callback.on_fit_start(Alone(), None)
            callback._save(Alone())
        except InputError as error:
            told.append(str(error))
    return told


@pytest.mark.ddp
def test_what_ends_one_rank_at_a_checkpoint_ends_all(pool: Callable[[int], Any], tmp_path: Path) -> None:
    """Rank 0 alone writes and proves; the others would wait for it until their collective's time limit."""
    mine, other = pool(2).run(__file__, "rank_of_a_bad_checkpoint", {"folder": str(tmp_path)})
    assert mine == other
    assert len(mine) == 2
    assert "cannot be read back" in mine[0]
    assert "would resume from different checkpoints (steps [0, 5], -1 is none)" in mine[1]
    assert not list(tmp_path.iterdir())
