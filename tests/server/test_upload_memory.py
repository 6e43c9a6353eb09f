"""A large upload costs the server no memory, whichever way it comes. Linux: the kernel's high-water mark is read."""

import sys
from pathlib import Path

import pytest
from bench.upload import measure, server

MIB = 1024**2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_upload_grows_the_server_by_little(tmp_path: Path) -> None:
    """`python -m bench.upload` does the same with 2 GB: what grows with the file shows here as well."""
    with server(tmp_path) as (process, url):
        found = [measure(process, url, way, 200 * MIB, 64 * 1024) for way in ("one request", "parts")]

    for uploaded in found:
        assert uploaded.status == "processed"
        assert uploaded.growth_bytes < 40 * MIB, uploaded
        assert uploaded.check_peak_bytes < 80 * MIB, uploaded
