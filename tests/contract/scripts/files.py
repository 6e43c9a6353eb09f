"""files.create, retrieve, list, delete, content, wait_for_processing, sync and async: OpenAI's own package as it is."""

import asyncio
import io
import tempfile
from pathlib import Path

import openai
from expect import raises

GOOD = b'{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}\n'
BAD = b'{"messages": []}\nnot json\n'


def main() -> None:
    client = openai.OpenAI()
    made = client.files.create(
        file=("rows.jsonl", io.BytesIO(GOOD)),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (made.object, made.filename, made.purpose, made.bytes) == (
        "file",
        "rows.jsonl",
        "fine-tune",
        len(GOOD),
    )
    assert made.expires_at == made.created_at + 7200
    assert made.status in ("uploaded", "processed")
    done = client.files.wait_for_processing(made.id, poll_interval=0.05, max_wait_seconds=20)
    assert (done.status, done.status_details) == ("processed", None)
    assert client.files.retrieve(made.id).model_dump() == done.model_dump()
    assert client.files.content(made.id).read() == GOOD
    assert client.files.content(made.id).text == GOOD.decode()

    wrong = client.files.create(file=("wrong.jsonl", BAD), purpose="fine-tune")
    wrong = client.files.wait_for_processing(wrong.id, poll_interval=0.05, max_wait_seconds=20)
    assert wrong.status == "error"
    assert "line 2, row: is not JSON" in str(wrong.status_details)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notes.pdf"
        path.write_bytes(b"%PDF-")
        notes = client.files.create(file=path, purpose="user_data")
    assert (notes.filename, notes.status) == ("notes.pdf", "processed")

    ids = [made.id, wrong.id, notes.id]
    assert [file.id for file in client.files.list()] == ids[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=1)] == ids  # three pages
    assert [file.id for file in client.files.list(purpose="fine-tune")] == ids[1::-1]
    first = client.files.list(order="asc", limit=1)
    assert client.files.delete(made.id).model_dump() == {"id": made.id, "object": "file", "deleted": True}
    assert [file.id for file in first] == ids  # the second page begins after one that is gone
    with raises(openai.NotFoundError, code="unknown_file"):
        client.files.retrieve(made.id)
    with raises(openai.NotFoundError, code="unknown_file"):
        client.files.content(made.id)
    asyncio.run(later())


async def later() -> None:
    async with openai.AsyncOpenAI() as client:
        made = await client.files.create(file=("later.jsonl", GOOD), purpose="fine-tune")
        done = await client.files.wait_for_processing(made.id, poll_interval=0.05, max_wait_seconds=20)
        assert done.status == "processed"
        assert (await client.files.content(made.id)).content == GOOD
        found = [file.id async for file in client.files.list(limit=1)]
        assert found[0] == made.id
        assert len(found) == 3
        assert (await client.files.delete(made.id)).deleted


main()
