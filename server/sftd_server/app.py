"""The server process: `sftd-server --data DIR --port 8000`, or `python -m sftd_server.app`.

Puts the parts together, runs them, and stops them: SIGTERM or Ctrl-C ends open streams and long polls, finishes
queued writes, folds the WAL into the database, and exits with 0.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

import sftd
from sftd.discovery import remember_server
from sftd_server import docs, installation, keys, migrations, status, storage
from sftd_server.artifacts import router as artifacts_router
from sftd_server.artifacts.mirror import Mirror
from sftd_server.audit import router as audit_router
from sftd_server.clock import Clock
from sftd_server.connections import BACKLOG, Connections, allow_files, protocol_for
from sftd_server.datafolder import StartRefused, require_local
from sftd_server.errors import install_error_handlers
from sftd_server.exposure import check_exposure
from sftd_server.files import router as files_router
from sftd_server.files.checker import Checker
from sftd_server.gate import Gate
from sftd_server.janitor import Janitor
from sftd_server.jobs import removal
from sftd_server.jobs import router as jobs_router
from sftd_server.openai import files as openai_files
from sftd_server.openai import jobs as openai_jobs
from sftd_server.openai import models as openai_models
from sftd_server.openai import uploads as openai_uploads
from sftd_server.openai.results import ResultFiles
from sftd_server.plans import router as plans_router
from sftd_server.server import Server
from sftd_server.settings import Settings, SettingsError, read_settings
from sftd_server.upkeep import Upkeep
from sftd_server.workers import router as workers_router
from sftd_server.workers.reaper import Reaper

log = logging.getLogger("sftd.server")

_PARTS = (
    plans_router,  # its /jobs/plan stands before /jobs/{job_id}
    jobs_router,
    files_router,
    workers_router,
    artifacts_router,
    openai_jobs,
    openai_models,
    openai_files,
    openai_uploads,
    keys,
    audit_router,
    status,
    storage,
    docs,
)


def create_app(settings: Settings, clock: Clock | None = None) -> FastAPI:
    """The server as an ASGI app. Nothing is read or written before its lifespan begins."""
    server = Server(settings, clock)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(server) as janitor:
            app.state.janitor = janitor
            yield

    app = FastAPI(
        title="sftd",
        version=sftd.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    app.add_middleware(Gate, server=server)
    install_error_handlers(app)
    app.include_router(plans_router.worker_router)
    for part in _PARTS:
        app.include_router(part.router)
    docs.describe(app)
    return app


@contextlib.asynccontextmanager
async def running(server: Server) -> AsyncIterator[Janitor]:
    """The server's life: lock, migrate, load; then reaper, upkeep and janitor beside the requests; then stop cleanly."""
    lock = take_folder(server)
    try:
        server.disk.begin()
        await asyncio.to_thread(migrations.upgrade, server.db.engine)
        server.db.start()
        await server.set_clock()
        await installation.load(server)
        await _finish_removals(server)
        reaper = Reaper(server)
        await reaper.begin()
        janitor = Janitor(server)
        beside = [
            asyncio.create_task(reaper.run(), name="reaper"),
            asyncio.create_task(Upkeep(server).run(), name="upkeep"),
            asyncio.create_task(janitor.run(), name="janitor"),
            asyncio.create_task(Mirror(server).run(), name="mirror"),
            asyncio.create_task(ResultFiles(server).run(), name="result files"),
            asyncio.create_task(Checker(server).run(), name="checker"),
        ]
        if server.db.shared:
            beside.append(asyncio.create_task(server.keyring.follow(), name="keys"))
        try:
            yield janitor
        finally:
            server.begin_stop()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await reaper.end()
            await server.db.stop()
    finally:
        os.close(lock)


async def _finish_removals(server: Server) -> None:
    """Delete the folders of jobs that were deleted when a server died."""
    jobs = server.folder.path / "jobs"
    noted = removal.noted(jobs)
    kept = await server.db.read(lambda session: removal.existing(session, noted))
    server.in_background(asyncio.to_thread(removal.sweep, jobs, noted, kept))


def take_folder(server: Server) -> int:
    """Make the data folder, and take it: alone with SQLite, with others with PostgreSQL. Raises StartRefused."""
    server.folder.prepare()
    shared = server.db.shared
    if not shared:
        require_local(Path(make_url(server.settings.database_url).database or ""))
    lock = server.folder.lock(shared=shared)
    server.folder.clear_tmp(shared=shared)
    return lock


class UvicornServer(uvicorn.Server):
    """Uvicorn, which tells our server of a stop before it waits for open requests, and says where it listens."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # sockets: unused here
        self._loop = asyncio.get_running_loop()
        await super().startup()
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            _announce(self._server, host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._server.begin_stop)


def _announce(server: Server, host: str, port: int) -> None:
    """One line for a person, and a note for clients on this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    given = server.settings.admin_key is not None
    if given:
        where = "the admin's key is the one in SFTD_ADMIN_KEY"
    elif server.folder.admin_key.exists():
        where = f"the admin's key is in {server.folder.admin_key}"
    else:
        where = "the admin's key is the one that its first server made"
    print(f"sftd-server {sftd.__version__} listens on {url}; docs at {url}/docs; {where}", flush=True)
    remember_server(url=url, key_file=server.folder.admin_key)


def main() -> None:
    """Run the server until it is told to stop."""
    parser = argparse.ArgumentParser(prog="sftd-server", description="The sftd server.")
    parser.add_argument("--data", type=Path, help="data folder (SFTD_DATA)")
    parser.add_argument("--host", help="address to listen on (SFTD_HOST, default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (SFTD_PORT, default 8000)")
    parser.add_argument("--version", action="version", version=f"sftd-server {sftd.__version__}")
    arguments = parser.parse_args()
    os.umask(0o077)  # whatever is written here is for this user alone
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and stop are told by us
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        settings = read_settings(os.environ, **vars(arguments))
        run(settings)
    except (SettingsError, StartRefused) as error:
        sys.exit(f"sftd-server: {error}")


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    app = create_app(settings)
    # What stands in the way is told in a sentence; the lifespan takes the folder for good.
    os.close(take_folder(app.state.server))
    check_exposure(settings, app.state.server.folder)
    _require_database(app.state.server)
    connections = Connections(
        most=allow_files(settings.max_connections),
        most_per_address=settings.max_connections_per_address,
        head_seconds=settings.head_seconds,
        trusted_proxies=settings.trusted_proxies,
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol_for(connections),
        backlog=BACKLOG,
        proxy_headers=False,  # uvicorn would believe whatever X-Forwarded-For this machine's own users send
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=round(settings.stop_seconds + 0.5),
        timeout_keep_alive=75,
    )
    # Uvicorn raises the signal again when it is done; a clean stop is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    serving = UvicornServer(config, app.state.server)
    serving.run()
    if not serving.started:
        sys.exit(3)


def _require_database(server: Server) -> None:
    """A database that does not answer is told in a sentence. Raises StartRefused."""
    try:
        with server.db.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except DBAPIError as error:
        shown = make_url(server.settings.database_url).render_as_string(hide_password=True)
        said = " ".join(str(error.orig).split())
        raise StartRefused(f"The database {shown} does not answer: {said}. See SFTD_DATABASE_URL.") from None


if __name__ == "__main__":
    main()
