"""The data folder: not on a network file system with SQLite; locks among processes."""

import asyncio
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sftd_server import datafolder
from sftd_server.datafolder import DataFolder, DataFolderInUse, FolderLock, NetworkFileSystem, require_local
from sftd_server.disk import try_lock

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /mnt/team rw,relatime shared:9 - nfs4 box:/export rw,vers=4.2
31 30 0:41 / /mnt/team/scratch rw - xfs /dev/vdb rw
32 22 0:42 / /mnt/with\\040space rw master:3 - cifs //box/share rw
33 22 0:43 / /mnt/far rw - fuse.sshfs me@box:/ rw
34 22 0:44 / /mnt/over rw - nfs box:/x rw
35 34 0:45 / /mnt/over rw - tmpfs none rw
36 22 0:46 / /mnt/teamwork rw - ext4 /dev/vdc rw
"""


@pytest.mark.parametrize(
    "path", ["/mnt/team/sftd.db", "/mnt/team/a/b.db", "/mnt/with space/x.db", "/mnt/far/x.db"]
)
def test_sqlite_on_a_network_file_system_is_refused(path: str) -> None:
    with pytest.raises(NetworkFileSystem, match="SFTD_DATABASE_URL"):
        require_local(Path(path), MOUNTS)


@pytest.mark.parametrize(
    "path", ["/srv/x.db", "/mnt/team/scratch/x.db", "/mnt/over/x.db", "/mnt/teamwork/x.db"]
)
def test_sqlite_on_a_local_file_system_is_not(path: str) -> None:
    require_local(Path(path), MOUNTS)


def test_this_machine_s_own_mounts_are_read(tmp_path: Path) -> None:
    require_local(tmp_path / "sftd.db")


def test_servers_that_share_a_database_share_the_folder_and_nobody_else_does(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.prepare()
    first, second = folder.lock(shared=True), folder.lock(shared=True)
    with pytest.raises(DataFolderInUse):
        folder.lock()
    os.close(first)
    os.close(second)

    alone = folder.lock()
    with pytest.raises(DataFolderInUse):
        folder.lock(shared=True)
    os.close(alone)


def test_an_upload_of_another_server_is_left_alone(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.prepare()
    for name, age in (("upload-new", 60), ("upload-old", 7200)):
        (folder.tmp / name).touch()
        os.utime(folder.tmp / name, (time.time() - age,) * 2)

    folder.clear_tmp(shared=True)
    assert [path.name for path in folder.tmp.iterdir()] == ["upload-new"]
    folder.clear_tmp()
    assert list(folder.tmp.iterdir()) == []


def test_a_folder_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    path = tmp_path / "files.lock"
    hold = f"import fcntl, sys; f = open({str(path)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == b"held\n"

    async def scenario() -> list[str]:
        lock, order = FolderLock(path, shared=True), []

        async def take(name: str) -> None:
            async with lock:
                order.append(name)

        given_up = asyncio.create_task(take("given up"))
        await asyncio.sleep(0.2)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        tasks = [asyncio.create_task(take(name)) for name in ("a", "b")]
        await asyncio.sleep(0.2)
        assert order == []
        other.stdin.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        return order

    assert asyncio.run(scenario()) == ["a", "b"]
    other.wait(10)
    other.stdout.close()


def test_waiting_for_locks_of_another_server_leaves_the_threads_free(tmp_path: Path) -> None:
    """As when it waits, holding them, for what the threads here are to finish."""
    held = {name: try_lock(tmp_path / name) for name in ("a", "b", "c")}

    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))

        async def take(name: str) -> None:
            async with FolderLock(tmp_path / name, shared=True):
                pass

        waiting = [asyncio.create_task(take(name)) for name in held]
        await asyncio.sleep(0.01)
        try:
            await asyncio.wait_for(asyncio.to_thread(lambda: None), 5)
        finally:
            for handle in held.values():
                assert handle is not None
                os.close(handle)
        await asyncio.wait_for(asyncio.gather(*waiting), 5)

    asyncio.run(scenario())


def test_a_lock_that_one_server_hands_on_and_on_is_had_by_another(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datafolder, "_MOST_STREAK", 0.05)

    async def scenario() -> None:
        busy, other = (FolderLock(tmp_path / "lock", shared=True) for _ in range(2))

        async def keep_busy() -> None:
            while True:
                async with busy:
                    await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(keep_busy()) for _ in range(3)]
        await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(5), other:
                pass
        finally:
            for task in tasks:
                task.cancel()

    asyncio.run(scenario())
