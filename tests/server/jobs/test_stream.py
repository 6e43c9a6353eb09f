"""Server-sent events: from the beginning, from where one left off, to the end."""

import threading

import pytest

STREAM = {"accept": "text/event-stream"}


def test_a_finished_job_is_streamed_to_its_end(box, read_events) -> None:
    lease = box.running()
    lease.post("logs", seq=0, lines=["one", "two\u2028lines", "<script>\x1b[31m\nthree"])
    lease.finish()

    logs = read_events(box.admin.get(f"/jobs/{lease.job_id}/logs", headers=STREAM).text)
    events = read_events(box.admin.get(f"/jobs/{lease.job_id}/events", headers=STREAM).text)

    assert [frame["event"] for frame in logs] == ["log", "log", "log", "end"]
    assert logs[-1]["data"] == '{"state": "succeeded"}'
    assert [frame["event"] for frame in events] == ["queued", "claimed", "running", "succeeded", "end"]


@pytest.mark.parametrize("how", ["header", "parameter"])
def test_a_stream_goes_on_after_the_last_event_that_was_seen(box, read_events, how: str) -> None:
    lease = box.running()
    lease.post("logs", seq=0, lines=["one", "two", "three"])
    lease.finish()
    url = f"/jobs/{lease.job_id}/logs"
    second = read_events(box.admin.get(url, headers=STREAM).text)[1]["id"]

    headers = {**STREAM, "last-event-id": second} if how == "header" else STREAM
    params = {"after": second} if how == "parameter" else {}
    frames = read_events(box.admin.get(url, headers=headers, params=params).text)

    assert ["three" in frame["data"] for frame in frames] == [True, False]


def test_lines_are_sent_as_they_come(box) -> None:
    lease = box.running()
    seen, connected = [], threading.Event()

    def follow() -> None:
        with box.client("sftd-admin-key-of-the-tests").stream(
            "GET", f"/jobs/{lease.job_id}/logs", headers=STREAM
        ) as answer:
            for line in answer.iter_lines():
                connected.set()
                if line.startswith("data:"):
                    seen.append(line)

    following = threading.Thread(target=follow)
    following.start()
    assert connected.wait(5)
    for seq in range(5):
        lease.post("logs", seq=seq, lines=[f"line {seq}"])
    lease.finish()
    following.join(5)

    assert [f"line {i}" in line for i, line in enumerate(seen)] == [True] * 5 + [False]
    assert "succeeded" in seen[-1]


def test_a_silent_stream_keeps_the_connection_alive(make_box) -> None:
    box = make_box(keepalive_seconds=0.05)
    job_id = box.submit()

    with box.admin.stream("GET", f"/jobs/{job_id}/logs", headers=STREAM) as answer:
        lines = answer.iter_lines()
        comments = [next(lines) for _ in range(5)]

    assert comments == [": open", "", ": still here", "", ": still here"]


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9" * 30, "١"])
def test_a_malformed_last_event_id_is_refused(shared_box, assert_error, given: str) -> None:
    job_id = shared_box.submit()
    headers = {**STREAM, "last-event-id": given.encode()}

    answer = shared_box.admin.get(f"/jobs/{job_id}/events", headers=headers)

    assert assert_error(answer, 422, "invalid_request")["param"] == "Last-Event-ID"


def test_logs_and_events_are_listed_by_cursor(box) -> None:
    lease = box.running()
    lease.post("logs", seq=0, lines=[f"line {i}" for i in range(5)])

    page = box.admin.get(f"/jobs/{lease.job_id}/logs", params={"limit": 3}).json()
    rest = box.admin.get(f"/jobs/{lease.job_id}/logs", params={"after": page["next_after"]}).json()

    assert [line["text"] for line in page["data"] + rest["data"]] == [f"line {i}" for i in range(5)]
    assert (page["has_more"], rest["has_more"], rest["next_after"]) == (True, False, None)
