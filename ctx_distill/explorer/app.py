"""The explorer's pages and HTTP interface."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response

from ctx_distill.errors import InputError
from ctx_distill.explorer.guard import Guard
from ctx_distill.explorer.limits import MB, Limits
from ctx_distill.explorer.results import RESULT, SCAN
from ctx_distill.explorer.sessions import Session, Sessions, TooMany
from ctx_distill.explorer.uploads import clean_name
from ctx_distill.explorer.viewer import licences, niivue
from ctx_distill.explorer.worker import Refused, ScanJob, Worker
from ctx_distill.reporting.run_page import TEMPLATES

STATIC = Path(__file__).parent / "static"


def build_app(worker: Worker, sessions: Sessions, limits: Limits, host: str, names: Iterable[str] = ()) -> Guard:
    """Build the guarded app; the worker must be running."""
    scratch = _Scratch(worker, sessions, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        sweeping = asyncio.create_task(scratch.sweep())
        try:
            yield
        finally:
            sweeping.cancel()
            # Close the worker first, so that nothing is written to deleted folders.
            worker.close()
            sessions.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_pages(app, worker, limits)
    _add_sessions(app, scratch, sessions)
    return Guard(app, host, names)


def _add_pages(app: FastAPI, worker: Worker, limits: Limits) -> None:
    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse((STATIC / "index.html").read_text(encoding="utf-8"))

    @app.get("/style.css")
    def style() -> Response:
        sheets = (TEMPLATES / "style.css", STATIC / "explorer.css")
        return Response("\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets), media_type="text/css")

    @app.get("/explorer.js")
    def script() -> FileResponse:
        return FileResponse(STATIC / "explorer.js", media_type="text/javascript")

    @app.get("/viewer.js")
    def viewer_script() -> FileResponse:
        return FileResponse(STATIC / "viewer.js", media_type="text/javascript")

    @app.get("/niivue.js")
    def viewer() -> FileResponse:
        return FileResponse(niivue(), media_type="text/javascript")

    @app.get("/licences.txt")
    def licence_texts() -> PlainTextResponse:
        return PlainTextResponse(licences())

    @app.get("/favicon.ico", status_code=204)
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/api/about")
    def about() -> dict[str, Any]:
        model = worker.about
        return {
            "facts": model.facts,
            "nearest": model.nearest,
            "shows_pool": model.shows_pool,
            "upload_mb": limits.max_upload_mb,
            "idle_minutes": limits.idle_minutes,
        }


def _add_sessions(app: FastAPI, scratch: _Scratch, sessions: Sessions) -> None:
    def known(key: str) -> Session:
        session = sessions.get(key)
        if session is None:
            raise HTTPException(404, "this session has ended and its scan was deleted; drop the scan again")
        return session

    @app.post("/api/sessions", status_code=201)
    def new() -> dict[str, str]:
        try:
            return {"session": sessions.new().key}
        except TooMany:
            raise HTTPException(429, "too many open sessions; end one, or wait until an idle one ends") from None

    @app.put("/api/sessions/{key}/scan", status_code=202)
    async def put_scan(key: str, request: Request, name: str = "upload") -> dict[str, str]:
        await scratch.receive(known(key), request, clean_name(name))
        return {"state": "waiting"}

    @app.get("/api/sessions/{key}")
    def state(key: str) -> dict[str, str]:
        session = known(key)
        return {"state": session.state, "message": session.message}

    @app.post("/api/sessions/{key}/end", status_code=204)
    def end(key: str) -> Response:
        session = sessions.get(key)
        if session is not None:
            sessions.end(session)
        return Response(status_code=204)

    @app.get("/api/sessions/{key}/result")
    def result(key: str) -> Response:
        return _file(known(key), RESULT, "application/json")

    @app.get("/api/sessions/{key}/scan.nii")
    def scan(key: str) -> Response:
        return _file(known(key), SCAN, "application/octet-stream")

    @app.get("/api/sessions/{key}/saliency/{number}.nii")
    def saliency(key: str, number: int) -> Response:
        return _file(known(key), f"saliency-{number}.nii", "application/octet-stream")

    @app.get("/api/sessions/{key}/xray/{number}.png")
    def xray(key: str, number: int) -> Response:
        return _file(known(key), f"xray-{number}.png", "image/png")


def _file(session: Session, name: str, kind: str) -> Response:
    path = session.folder / name
    if session.state != "done" or not path.is_file():
        return JSONResponse({"detail": "no such result"}, 404)
    return FileResponse(path, media_type=kind)


class _Scratch:
    """Receive uploads and pass them to the worker."""

    def __init__(self, worker: Worker, sessions: Sessions, limits: Limits) -> None:
        self._worker, self._sessions, self._limits = worker, sessions, limits
        self._running: set[asyncio.Task[None]] = set()
        self._one = ThreadPoolExecutor(max_workers=1)  # jobs must not wait in the pool that serves requests

    async def receive(self, session: Session, request: Request, name: str) -> None:
        """Write the body to the session's folder and start the job.

        Raises:
            HTTPException: 409 the session already has a scan, 408 the upload takes too long, 413 it is too large.
        """
        if session.state != "new":
            raise HTTPException(409, "this session already has a scan; open another session")
        session.state = "receiving"
        path = session.folder / "received"
        try:
            declared = int(request.headers.get("content-length") or 0)
            if declared > self._limits.max_upload_mb * MB:
                raise self._too_large()
            with path.open("xb") as file:
                async with asyncio.timeout(self._limits.max_seconds):
                    size = 0
                    async for piece in request.stream():
                        size += len(piece)
                        if size > self._limits.max_upload_mb * MB:
                            raise self._too_large()
                        file.write(piece)
        except TimeoutError:
            self._sessions.end(session)
            raise HTTPException(
                408,
                f"the upload took longer than {self._limits.max_seconds:g} seconds; restart with a larger --max-seconds",
            ) from None
        except OSError as error:
            self._sessions.end(session)
            raise HTTPException(507, f"the scan cannot be stored ({error.strerror}); free disk space") from error
        except BaseException:
            self._sessions.end(session)
            raise
        session.state = "waiting"
        task = asyncio.create_task(self._work(session, ScanJob(session.folder, path, name)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413, f"larger than {self._limits.max_upload_mb:,.0f} MB; restart the explorer with a larger --max-upload-mb"
        )

    async def _work(self, session: Session, job: ScanJob) -> None:
        def tell(step: str) -> None:
            session.state = step

        try:
            await asyncio.get_running_loop().run_in_executor(self._one, self._worker.run, job, tell)
            session.state = "done"
        except (Refused, InputError) as refusal:
            session.state, session.message = "refused", str(refusal)
        except BaseException:
            session.state, session.message = "refused", "internal error; see the log of the explorer"
            raise
        finally:
            with contextlib.suppress(OSError):
                job.received.unlink(missing_ok=True)
            self._sessions.get(session.key)  # restart the idle time
            if session.ended:
                self._sessions.end(session)

    async def sweep(self) -> None:
        """End idle sessions periodically."""
        while True:
            await asyncio.sleep(min(5.0, self._limits.idle_minutes * 15))
            await asyncio.to_thread(self._sessions.sweep)
