"""An S3 server on loopback, and a bucket of each test's own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import boto3
import pytest
from moto.server import ThreadedMotoServer

CREDENTIALS = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}


@dataclass
class Bucket:
    """A bucket, and the settings of a server that mirrors to it."""

    s3: Any  # boto3's client, made at run time
    name: str
    endpoint: str

    @property
    def settings(self) -> dict[str, Any]:
        options = {"endpoint_url": self.endpoint, "key": "test", "secret": "test"}
        return {
            "artifacts_url": f"s3://{self.name}/team/sftd",
            "artifacts_options": json.dumps(options),
            "mirror_seconds": 3600,  # tests say when
        }

    def names(self, below: str = "") -> list[str]:
        listed = self.s3.list_objects_v2(Bucket=self.name, Prefix=f"team/sftd/{below}")
        return sorted(entry["Key"].removeprefix("team/sftd/") for entry in listed.get("Contents", []))

    def read(self, key: str) -> bytes:
        return bytes(self.s3.get_object(Bucket=self.name, Key=f"team/sftd/{key}")["Body"].read())

    def write(self, key: str, content: bytes) -> None:
        self.s3.put_object(Bucket=self.name, Key=f"team/sftd/{key}", Body=content)

    def uploads_under_way(self) -> list[str]:
        return [
            upload["Key"] for upload in self.s3.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        ]


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto: str) -> Bucket:
    client = boto3.client("s3", endpoint_url=moto, **CREDENTIALS)
    name = f"b{uuid4().hex[:20]}"
    client.create_bucket(Bucket=name)
    return Bucket(client, name, moto)
