"""An S3 server on loopback, in a thread of the tests, and buckets in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import boto3
from moto.server import ThreadedMotoServer

_CREDENTIALS = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Its address, while it runs. It takes the key `test` with the secret `test`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def new_bucket(endpoint: str) -> tuple[Any, str]:
    """boto3's client (a class made at run time), and the name of a bucket of its own."""
    client = boto3.client("s3", endpoint_url=endpoint, **_CREDENTIALS)
    name = f"b{uuid4().hex[:20]}"
    client.create_bucket(Bucket=name)
    return client, name
