"""Rows of a data file as they were understood, from any place in it."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.waiting import until

from sftd.rows import Mark, RowProblem, check_file, look_into
from sftd_server.files import checks

TOOL = {"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}}


def rows(box, file_id: str, **params):
    return box.admin.get(f"/files/{file_id}/rows", params=params)


def large(kind: str) -> bytes:
    """Some 600 KB, more than is looked through from its beginning."""
    lines = [
        json.dumps({"text": f"row {number} ü " + "x" * 200}, ensure_ascii=False) for number in range(2500)
    ]
    return ("[" + ",\n ".join(lines) + "]" if kind == "array" else "\n".join(lines)).encode()


def test_a_row_is_shown_as_it_was_understood(box) -> None:
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
            {"role": "assistant", "content": "4", "weight": 0},
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "6"},
        ],
        "tools": [TOOL],
    }

    (shown,) = rows(box, box.upload(json.dumps(row).encode())).json()["data"]

    assert (shown["line"], shown["format"], shown["problem"]) == (1, "messages", None)
    assert [message["content"] for message in shown["messages"]] == ["2+2?", "4", "3+3?", "6"]
    assert shown["weights"] == [0, 0, 0, 1]
    assert shown["tools"] == [TOOL]


@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_page_deep_in_a_large_file_begins_at_a_mark(box, kind: str) -> None:
    file_id = box.upload(large(kind))

    page = rows(box, file_id, after=2400, limit=2).json()

    assert [(row["line"], row["text"][:10]) for row in page["data"]] == [
        (2401, "row 2400 ü"),
        (2402, "row 2401 ü"),
    ]
    assert (page["has_more"], page["next_after"]) == (True, 2402)
    assert [row["line"] for row in rows(box, file_id, after=2498).json()["data"]] == [2499, 2500]
    assert rows(box, file_id, after=2500).json() == {
        "object": "list",
        "data": [],
        "has_more": False,
        "next_after": None,
    }


def test_marks_that_are_gone_or_broken_are_made_anew_and_go_with_the_file(box) -> None:
    file_id = box.upload(large("lines"))
    (marks,) = (box.server.folder.path / "cache").glob("rows-*")
    for broken in (b"x" * 15, None):
        marks.unlink() if broken is None else marks.write_bytes(broken)

        assert rows(box, file_id, after=2000, limit=1).json()["data"][0]["line"] == 2001

    box.admin.delete(f"/files/{file_id}")
    assert not marks.exists()


def count_checks(box, gate: asyncio.Event | None = None) -> list[Path]:
    """The checks that begin in processes of their own from now on; they wait for `gate`."""
    begun, really = [], box.server.checks._in_process

    async def counted(path: Path, marks: Path):
        begun.append(path)
        if gate is not None:
            await gate.wait()
        return await really(path, marks)

    box.server.checks._in_process = counted
    return begun


def test_many_who_look_at_a_file_whose_marks_are_gone_share_one_check_and_hold_up_no_other(box) -> None:
    file_id, gate = box.upload(large("lines")), asyncio.Event()
    next((box.server.folder.path / "cache").glob("rows-*")).unlink()
    begun = count_checks(box, gate)

    with ThreadPoolExecutor(6) as pool:
        looks = [pool.submit(rows, box, file_id, after=2000, limit=1) for _ in range(6)]
        until(lambda: begun)
        assert box.server.checks._processes._value == checks.NUM_PROCESSES  # free for what jobs wait for
        box.loop.call_soon_threadsafe(gate.set)
        answers = [look.result(20) for look in looks]

    assert [answer.json()["data"][0]["line"] for answer in answers] == [2001] * 6
    assert len(begun) == 1


def test_a_large_file_without_rows_is_not_checked_at_every_look(box) -> None:
    content = b"[" + b" " * 300_000 + b"]"
    made = box.admin.post("/v1/files", files={"file": content}, data={"purpose": "fine-tune"}).json()
    until(lambda: box.admin.get(f"/files/{made['id']}").json()["status"] == "error")
    begun = count_checks(box)

    assert rows(box, made["id"]).json()["data"] == []
    assert begun == []


@pytest.mark.parametrize("kind", ["lines", "array"])
def test_every_row_can_be_reached_from_the_mark_before_it(tmp_path: Path, kind: str) -> None:
    path, marks = tmp_path / "rows", list[Mark]()
    path.write_bytes(b"\xef\xbb\xbf" + large(kind))
    check_file(path, name="rows", marks=marks)
    assert [mark.line for mark in marks[:3]] == [1, 257, 513]

    for mark in marks:
        after = mark.line + 3
        found = next(look_into(path, mark=mark, after=after, form="text"))
        assert not isinstance(found.row, RowProblem)
        assert found.row.line == after + 1
        assert str(found.row.text).startswith(f"row {after} ")


def test_what_is_wrong_with_a_row_stands_in_its_place(box) -> None:
    content = b'{"text": "a"}\nnot json\n{"prompt": "a"}\n\n{"text": "b"}\n'
    made = box.admin.post("/v1/files", files={"file": content}, data={"purpose": "fine-tune"}).json()

    shown = rows(box, made["id"]).json()["data"]

    assert [row["line"] for row in shown] == [1, 2, 3, 5]
    assert [row["text"] for row in shown] == ["a", None, None, "b"]
    assert shown[1]["problem"].startswith("row: is not JSON")


def test_an_array_that_breaks_off_says_so_after_its_rows(box) -> None:
    made = box.admin.post(
        "/v1/files", files={"file": b'[{"text": "a"}, {"te'}, data={"purpose": "fine-tune"}
    ).json()

    shown = rows(box, made["id"]).json()["data"]

    assert [row["text"] for row in shown] == ["a", None]
    assert "breaks off" in shown[1]["problem"] or "not JSON" in shown[1]["problem"]


def test_a_page_of_long_rows_is_short(box) -> None:
    file_id = box.upload(b"\n".join(json.dumps({"text": "x" * 900_000}).encode() for _ in range(4)))

    page = rows(box, file_id).json()

    assert [row["line"] for row in page["data"]] == [1, 2]
    assert [row["line"] for row in rows(box, file_id, after=page["next_after"]).json()["data"]] == [3, 4]


def test_what_cannot_be_written_as_json_again_breaks_nothing(box) -> None:
    deep = "[" * 300 + "]" * 300
    call = {"function": {"name": "f", "arguments": {"a": "DEEP"}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = json.dumps({"messages": [{"role": "user", "content": "q"}, message]})
    content = row.replace('"DEEP"', deep) + "\n" + row.replace('"DEEP"', "1e999")

    answer = rows(box, box.upload(content.encode()))

    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 2


def test_a_file_without_rows_has_no_preview(box, assert_error) -> None:
    made = box.admin.post("/v1/files", files={"file": b"x"}, data={"purpose": "vision"}).json()

    assert_error(rows(box, made["id"]), 422, "invalid_request")
    assert_error(rows(box, "file_nope"), 404, "unknown_file")
