"""The explorer over HTTP, with a real server and worker process and a reader that needs no model."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from explorer_scans import dicom_zip, nifti_bytes

pytestmark = pytest.mark.full
HELPERS = Path(__file__).parents[1] / "helpers"
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {helpers!r})
from ctx_distill import signals
from ctx_distill.explorer.limits import Limits
from ctx_distill.explorer.server import Address, serve
from explorer_fake import open_fake
from ctx_distill.explorer import viewer
if __name__ == "__main__":
    viewer.NIIVUE = Path(__file__)  # these tests draw nothing
    with signals.listening():
        serve(open_fake, {mode!r}, Limits(**{limits!r}), Address(port=0))
"""
VOXELS = np.full((6, 8, 10), 300, np.int16)
BRIGHT = np.full((6, 8, 10), 2000, np.int16)


class Explorer:
    """A running explorer."""

    def __init__(self, folder: Path, mode: str = "", **limits: float) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        program = folder / "program.py"
        program.write_text(PROGRAM.format(helpers=str(HELPERS), mode=mode, limits=limits))
        self.process = subprocess.Popen(
            [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # no bytecode: on the full disk below it would be written in part, into the environment that runs the tests
            env={**os.environ, "TMPDIR": str(self.scratch), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("explorer: "):
                self.port = int(line.split("/")[2].split(":")[1])
                return
        raise AssertionError("".join(self.lines))

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def new(self) -> str:
        status, _, body = self.ask("POST", "/api/sessions")
        assert status == 201, body
        return str(json.loads(body)["session"])

    def send(self, content: bytes, name: str = "scan.nii.gz") -> tuple[str, dict[str, str]]:
        """(session, its last state) of a scan sent and waited for."""
        key = self.new()
        status, _, body = self.ask("PUT", f"/api/sessions/{key}/scan?name={name}", content)
        assert status == 202, body
        end = time.monotonic() + 60
        while time.monotonic() < end:
            state = json.loads(self.ask("GET", f"/api/sessions/{key}")[2])
            if state.get("state") in ("done", "refused") or "detail" in state:
                return key, state
            time.sleep(0.05)
        raise AssertionError("no end")

    def folders(self) -> list[Path]:
        return list(self.scratch.glob("ctx-distill-explorer-*/*"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@contextlib.contextmanager
def running(folder: Path, mode: str = "", **limits: float) -> Iterator[Explorer]:
    explorer = Explorer(folder, mode, **limits)
    try:
        yield explorer
    finally:
        if explorer.process.poll() is None:
            explorer.process.kill()
            explorer.process.wait()


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explorer]:
    with running(tmp_path_factory.mktemp("explorer"), max_upload_mb=2, max_unpacked_mb=8, max_sessions=3) as one:
        yield one


def test_a_full_disk_is_said_and_the_next_scan_is_taken(tmp_path: Path) -> None:
    """The kernel refuses to let the server's files grow (RLIMIT_FSIZE), as it does on a full disk."""
    with running(tmp_path) as one:
        before = resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (10_000, before[1]))
        key = one.new()
        status, _, body = one.ask("PUT", f"/api/sessions/{key}/scan?name=a.nii.gz", b"\x1f\x8b" + bytes(100_000))
        assert status == 507
        assert "cannot be stored" in json.loads(body)["detail"]
        assert not list(one.scratch.glob("ctx-distill-explorer-*/*/received"))
        resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, before)
        assert one.send(nifti_bytes(VOXELS))[1]["state"] == "done"
        assert one.stop() == 0


def test_a_scan_goes_in_and_its_answer_comes_out(explorer: Explorer) -> None:
    for content, name in ((nifti_bytes(VOXELS), "a.nii.gz"), (dicom_zip(VOXELS), "b.zip")):
        key, state = explorer.send(content, name)
        assert state == {"state": "done", "message": ""}
        result = json.loads(explorer.ask("GET", f"/api/sessions/{key}/result")[2])
        assert [(f["name"], f["value"]) for f in result["findings"]] == [("Bright", pytest.approx(0.3)), ("Low", 0.25)]
        assert result["scan"] == {
            "voxels": [10, 8, 6], "spacing": [1, 1, 2], "steps": [1, 1, 1],
            "name": name, "kind": "DICOM" if name == "b.zip" else "NIfTI",
        }  # fmt: skip
        # The peak at index (1, 1, 0) of a grid of half the scan's: z 6 mm of 10, y 4 of 7, x 0.
        assert result["findings"][0]["place"] == {
            "mm": [0, -4, 6], "words": "patient's right, middle third of the scan, centre",
        }  # fmt: skip
        shown = nib.Nifti1Image.from_bytes(explorer.ask("GET", f"/api/sessions/{key}/scan.nii")[2])
        np.testing.assert_array_equal(np.asarray(shown.dataobj), VOXELS.T)
        saliency = nib.Nifti1Image.from_bytes(explorer.ask("GET", f"/api/sessions/{key}/saliency/0.nii")[2])
        assert np.asarray(saliency.dataobj).max() == 255
        assert explorer.ask("GET", f"/api/sessions/{key}/saliency/1.nii")[0] == 404
        # Of the upload nothing is left but what the page shows; then nothing at all.
        assert sorted(p.name for p in explorer.folders()[0].iterdir()) == ["result.json", "saliency-0.nii", "scan.nii"]
        assert explorer.ask("POST", f"/api/sessions/{key}/end")[0] == 204
        assert not explorer.folders()
        assert explorer.ask("GET", f"/api/sessions/{key}/result")[0] == 404


def test_a_refused_scan_says_why_in_the_users_words(explorer: Explorer) -> None:
    key, state = explorer.send(dicom_zip(VOXELS, without=2), "my%20scan.zip")
    assert state["state"] == "refused"
    assert state["message"].startswith("my scan.zip: 1 slice(s) missing between IM0001.dcm and IM0003.dcm")
    explorer.ask("POST", f"/api/sessions/{key}/end")
    key, state = explorer.send(b"no scan at all", "letter.nii.gz")
    assert state["message"].startswith("letter.nii.gz: not a supported scan; expected a CT")
    explorer.ask("POST", f"/api/sessions/{key}/end")


def test_a_large_upload_is_refused_by_its_header_and_by_its_bytes(explorer: Explorer) -> None:
    key = explorer.new()
    status, _, body = explorer.ask("PUT", f"/api/sessions/{key}/scan", b"", {"Content-Length": str(3 << 20)})
    assert (status, b"larger than 2 MB" in body) == (413, True)
    key = explorer.new()
    chunks = (bytes(1 << 20) for _ in range(3))
    try:
        status, _, _ = explorer.ask("PUT", f"/api/sessions/{key}/scan", chunks)  # chunked, of no declared length
        assert status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server closed before all was sent
    assert not explorer.folders()


def test_sessions_have_a_number_and_take_one_scan(explorer: Explorer) -> None:
    keys = [explorer.new() for _ in range(3)]
    assert explorer.ask("POST", "/api/sessions")[0] == 429
    assert explorer.ask("PUT", f"/api/sessions/{keys[0]}/scan?name=a.nii.gz", nifti_bytes(VOXELS))[0] == 202
    assert explorer.ask("PUT", f"/api/sessions/{keys[0]}/scan?name=a.nii.gz", nifti_bytes(VOXELS))[0] == 409
    for key in keys:
        explorer.ask("POST", f"/api/sessions/{key}/end")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "evil.example:80"}, 400),
        ({"Host": "192.168.0.7:8787"}, 400),
        ({"Host": ""}, 400),
        ({"Host": "localhost:9"}, 201),
        ({"Host": "[::1]:9"}, 201),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 201),
    ],
)
def test_other_names_and_other_sites_are_refused(explorer: Explorer, headers: dict[str, str], status: int) -> None:
    found, _, body = explorer.ask("POST", "/api/sessions", headers=headers)
    assert found == status, body
    if found == 201:
        explorer.ask("POST", f"/api/sessions/{json.loads(body)['session']}/end")


def test_no_page_asks_for_anything_from_outside_and_unknown_paths_are_not_there(explorer: Explorer) -> None:
    for path in ("/", "/style.css", "/explorer.js", "/api/about", "/licences.txt"):
        status, headers, body = explorer.ask("GET", path)
        assert status == 200, path
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        if path != "/licences.txt":
            assert b"://" not in body.replace(b"http://www.w3.org/2000/svg", b""), path
    for path in (
        "/docs",
        "/openapi.json",
        "/api/sessions/x/..%2f..%2fetc",
        "/..%2f..%2fetc/passwd",
        "/api/sessions/zzz",
    ):
        assert explorer.ask("GET", path)[0] == 404


def test_what_takes_too_long_is_stopped_and_the_next_scan_is_read(tmp_path: Path) -> None:
    with running(tmp_path, "slow", max_seconds=2) as explorer:
        _, state = explorer.send(nifti_bytes(BRIGHT))
        assert state["state"] == "refused"
        assert "longer than 2 seconds" in state["message"]
        # An upload that trickles ends too, and leaves no session behind.
        key = explorer.new()
        connection = http.client.HTTPConnection("127.0.0.1", explorer.port, timeout=60)
        connection.putrequest("PUT", f"/api/sessions/{key}/scan")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(bytes(10))
        assert connection.getresponse().status == 408
        connection.close()
        assert explorer.ask("GET", f"/api/sessions/{key}")[0] == 404
    (tmp_path / "b").mkdir()
    with running(tmp_path / "b", "dies", idle_minutes=0.02) as explorer:
        _, state = explorer.send(nifti_bytes(BRIGHT))
        assert "crashed on this file" in state["message"]
        key, state = explorer.send(nifti_bytes(VOXELS))
        assert state["state"] == "done"
        end = time.monotonic() + 30  # idle after 1.2 seconds
        while explorer.folders() and time.monotonic() < end:
            time.sleep(0.1)
        assert not explorer.folders()
        assert explorer.ask("GET", f"/api/sessions/{key}/result")[0] == 404


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_when_the_server_ends(tmp_path: Path, number: int) -> None:
    with running(tmp_path) as explorer:
        explorer.send(nifti_bytes(VOXELS))
        assert explorer.folders()
        status = explorer.stop(number)
        if number != signal.SIGKILL:
            assert status == 0
        end = time.monotonic() + 20
        while list(explorer.scratch.glob("ctx-distill-explorer-*")) and time.monotonic() < end:
            time.sleep(0.1)
        assert not list(explorer.scratch.glob("ctx-distill-explorer-*"))


def test_a_model_that_cannot_be_opened_ends_it(tmp_path: Path) -> None:
    from explorer_fake import open_fake

    from ctx_distill.errors import InputError
    from ctx_distill.explorer.limits import Limits
    from ctx_distill.explorer.worker import Worker

    worker = Worker(open_fake, "broken", Limits(), tmp_path)
    with pytest.raises(InputError, match="no such model"):
        worker.start()
    assert not multiprocessing.active_children()


def test_without_the_viewer_it_says_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from explorer_fake import open_fake

    from ctx_distill.errors import InputError
    from ctx_distill.explorer import viewer
    from ctx_distill.explorer.limits import Limits
    from ctx_distill.explorer.server import Address, serve

    monkeypatch.setattr(viewer, "NIIVUE", tmp_path / "missing.js")
    with pytest.raises(InputError, match="run `make explorer` in a checkout"):
        serve(open_fake, "", Limits(), Address(port=0))
    monkeypatch.setattr(viewer, "NIIVUE", Path(__file__))
    with pytest.raises(InputError, match="cannot listen on"):
        serve(open_fake, "", Limits(), Address(host="192.0.2.1", port=0))
    with pytest.raises(InputError, match="expected a number above 0"):
        Limits(max_files=0)
    with pytest.raises(InputError, match="a wildcard would switch the check"):
        Address(names=["*.example.org"])
