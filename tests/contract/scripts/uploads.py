"""uploads.create, parts, complete, cancel, and upload_file_chunked, sync and async: OpenAI's own package as it is."""

import asyncio
import hashlib
import io
import tempfile
from pathlib import Path

import openai
from expect import raises

ROWS = b"".join(b'{"text": "row %d"}\n' % number for number in range(200))
MD5 = hashlib.md5(ROWS).hexdigest()


def main() -> None:
    client = openai.OpenAI()
    upload = client.uploads.create(
        filename="rows.jsonl",
        purpose="fine-tune",
        bytes=len(ROWS),
        mime_type="text/jsonl",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (upload.object, upload.status, upload.bytes, upload.file) == (
        "upload",
        "pending",
        len(ROWS),
        None,
    )
    assert upload.expires_at == upload.created_at + 3600
    last = client.uploads.parts.create(upload.id, data=io.BytesIO(ROWS[1000:]))
    first = client.uploads.parts.create(upload.id, data=ROWS[:1000])
    assert (last.object, last.upload_id) == ("upload.part", upload.id)
    done = client.uploads.complete(upload.id, part_ids=[first.id, last.id], md5=MD5)
    assert done.status == "completed"
    assert done.file is not None
    assert done.file.expires_at == done.file.created_at + 3600
    again = client.uploads.complete(upload.id, part_ids=[first.id, last.id])
    assert again.file is not None
    assert again.file.id == done.file.id
    ready = client.files.wait_for_processing(done.file.id, poll_interval=0.05, max_wait_seconds=20)
    assert ready.status == "processed"
    assert client.files.content(ready.id).content == ROWS

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.jsonl"
        path.write_bytes(ROWS)
        chunked = client.uploads.upload_file_chunked(
            file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=1000, md5=MD5
        )
    assert chunked.file is not None
    assert (chunked.file.filename, chunked.file.bytes) == ("large.jsonl", len(ROWS))

    other = client.uploads.create(filename="f", purpose="user_data", bytes=5, mime_type="text/plain")
    assert client.uploads.cancel(other.id).status == "cancelled"
    with raises(openai.ConflictError, code="upload_closed"):
        client.with_options(max_retries=0).uploads.parts.create(other.id, data=b"x")
    with raises(openai.NotFoundError, code="unknown_upload"):
        client.uploads.cancel("upload_nope")
    asyncio.run(later())


async def later() -> None:
    async with openai.AsyncOpenAI() as client:
        chunked = await client.uploads.upload_file_chunked(
            file=ROWS,
            filename="later.jsonl",
            bytes=len(ROWS),
            mime_type="text/jsonl",
            purpose="fine-tune",
            part_size=700,
        )
        assert chunked.file is not None
        content = await client.files.content(chunked.file.id)
        assert content.content == ROWS


main()
