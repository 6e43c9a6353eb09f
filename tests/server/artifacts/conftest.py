"""An S3 server on loopback, and a bucket of each test's own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.s3 import new_bucket, s3_server


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
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(moto: str) -> Bucket:
    return Bucket(*new_bucket(moto), moto)
