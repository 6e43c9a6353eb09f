"""What makes the servers on one database one installation: its id, its secret, its two built-in keys.

They are made at the first start. The id and the secret that lease tokens are derived from stand in the database, so that
every server has the same; an older installation's are taken over from its data folder. The id stands in the folder as
well: workers see by it that they share the folder.
"""

import functools
import logging
import secrets

from sqlmodel import Session, select

from sftd_server.datafolder import DataFolder, OtherInstallation
from sftd_server.server import Server
from sftd_server.tables import FactRow

ID_FILE = "installation.id"
SECRET_FILE = "server.secret"

log = logging.getLogger("sftd.server")


async def load(server: Server) -> None:
    """Read what the servers of this installation share; make it at the first start. Raises OtherInstallation."""
    folder = server.folder
    here = folder.read(ID_FILE)
    fresh_id = here or f"inst_{secrets.token_hex(16)}"
    fresh_secret = folder.read(SECRET_FILE) or secrets.token_hex(32)
    installation_id = await server.db.write(functools.partial(_fact, name="installation_id", fresh=fresh_id))
    if here is not None and here != installation_id:
        raise OtherInstallation(
            f"The data folder {folder.path} belongs to the installation {here}, the database to {installation_id}: start"
            " with the folder and the database (SFTD_DATABASE_URL) that go together, or with an empty folder."
        )
    if here is None:
        folder.write_secret(ID_FILE, installation_id)
    server.installation_id = installation_id
    server.secret = await server.db.write(functools.partial(_fact, name="lease_secret", fresh=fresh_secret))
    given = server.settings.admin_key
    await _install(server, "admin", "admin.key", None if given is None else given.get_secret_value())
    await _install(server, "worker", "worker.key", None)


def _fact(session: Session, *, name: str, fresh: str) -> str:
    """The value under this name; `fresh` where there was none. Two servers that start at once agree on one."""
    value = session.exec(select(FactRow.value).where(FactRow.name == name)).first()
    if value is None:
        value = fresh
        session.add(FactRow(name=name, value=value))
    return value


async def _install(server: Server, role: str, file: str, given: str | None) -> None:
    """Make the built-in key of a role the one that was given, or the one in the data folder.

    Where servers share a database, a folder without the key, or with an old one, does not take it from the others.
    """
    folder: DataFolder = server.folder
    secret = functools.partial(folder.secret, file, prefix="sftd-", bits=192)
    replace = given is not None or not server.db.shared
    installed = await server.keyring.install(
        role, secret if given is None else lambda: given, replace=replace
    )
    if not installed and not (folder.path / file).exists():
        log.info("the %s key was made by another server; there is no %s here", role, folder.path / file)
