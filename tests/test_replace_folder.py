"""An artefact is replaced without a moment in which there is none, whatever the file system, and at whatever moment a kill comes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from ctx_distill import files
from ctx_distill.checkpoint import read_artefact, write_artefact
from ctx_distill.errors import InputError


@pytest.fixture(params=["in one step", "in two steps"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Linux exchanges two folders in one step; NFS cannot."""
    if request.param == "in two steps":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    return str(request.param)


def write(folder: Path, number: int) -> None:
    write_artefact(folder, "classifier", {"number": number}, {"weight": torch.full((2,), float(number))})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_artefact_takes_the_place_and_nothing_is_left_beside_it(tmp_path: Path, steps: str) -> None:
    for number in (1, 2, 3):
        write(tmp_path / "artefact", number)
        found = read_artefact(tmp_path / "artefact", "classifier")
        assert found.config == {"number": number}
        assert found.weights()["weight"].tolist() == [number, number]
        assert names(tmp_path) == ["artefact"]
        assert names(tmp_path / "artefact") == ["artefact.json", "model.safetensors"]


def test_a_reader_that_never_rests_always_finds_an_artefact(tmp_path: Path, steps: str) -> None:
    place = tmp_path / "artefact"
    write(place, 0)
    over, seen, missed = threading.Event(), set(), []

    def read() -> None:
        while not over.is_set():
            try:
                seen.add(read_artefact(place, "classifier").config["number"])
            except Exception as error:  # whatever it is, the reader found no artefact
                missed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 200):
        write(place, number)
    over.set()
    reader.join()
    assert not missed
    assert len(seen) > 1


class Killed(BaseException):
    """Nothing of what would follow is done, as after SIGKILL."""


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_at_any_moment_leaves_an_artefact(
    tmp_path: Path, steps: str, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes before the `moment`-th call that changes a folder."""
    place, new = tmp_path / "artefact", tmp_path / ".artefact.new-1"
    write(place, 1)
    write(new, 2)
    calls = 0

    def deadly(call):  # type: ignore[no-untyped-def]
        def first_count(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return call(*args, **kwargs)

        return first_count

    monkeypatch.setattr(files, "REPLACE_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", deadly(Path.rename))
        patch.setattr(files.shutil, "rmtree", deadly(files.shutil.rmtree))
        patch.setattr(files, "_exchange", deadly(files._exchange))
        try:
            files.replace_folder(new, place)
        except Killed:
            done = False
        else:
            done = True
    found = read_artefact(place, "classifier").config["number"]
    assert found == 2 if done else found in (1, 2)
    write(place, 3)  # and the next writer starts from that state
    assert read_artefact(place, "classifier").config["number"] == 3
    assert names(tmp_path) == ["artefact"]


def test_what_is_missing_stays_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no classifier artefact"):
        read_artefact(tmp_path / "artefact", "classifier")


def test_two_nodes_with_the_same_process_id_do_not_write_into_one_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    before = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: written.append(path) or before(path, content))
    for _ in range(2):
        files.write_text(tmp_path / "layers.yaml", "a: 1\n")
    assert written[0] != written[1]
    assert names(tmp_path) == ["layers.yaml"]
