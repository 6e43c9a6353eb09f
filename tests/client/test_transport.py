"""One request: what is sent again, what is raised, what is never sent twice."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from sftd import _transport, errors
from sftd._transport import Transport
from sftd.errors import ApiError, ConfigurationError, ConnectionFailed, SequenceGap

if TYPE_CHECKING:
    from conftest import ScriptedServer


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, errors.Invalid),
        (401, errors.AuthenticationError),
        (403, errors.PermissionDenied),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (416, errors.SequenceGap),
        (422, errors.Invalid),
        (418, errors.ApiError),
    ],
)
def test_a_refusal_is_raised_by_its_status_and_not_repeated(
    scripted: "ScriptedServer", error_answer: Callable[..., Any], status: int, expected: type[ApiError]
) -> None:
    refusal = error_answer(status, message="why", code="c", param="p", headers={"x-request-id": "req_1"})
    scripted.will_answer(refusal)

    with pytest.raises(ApiError, match="why") as raised:
        scripted.client().jobs.retrieve("job_1")

    error = raised.value
    assert type(error) is expected
    assert (error.status, error.code, error.param, error.request_id) == (status, "c", "p", "req_1")
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 507])
def test_a_passing_trouble_is_tried_again(
    scripted: "ScriptedServer", error_answer: Callable[..., Any], job_answer: Callable[..., Any], status: int
) -> None:
    scripted.will_answer(error_answer(status), error_answer(status), job_answer())

    assert scripted.client().jobs.retrieve("job_1").id == "job_1"
    assert len(scripted.requests) == 3


def test_retries_end(scripted: "ScriptedServer", error_answer: Callable[..., Any]) -> None:
    scripted.will_answer(error_answer(503))

    with pytest.raises(errors.ServerError):
        scripted.client(max_retries=3).jobs.retrieve("job_1")

    assert len(scripted.requests) == 4
    assert all(0 <= pause <= 8 for pause in scripted.pauses)


def test_retry_after_is_honoured_within_reason(
    scripted: "ScriptedServer", error_answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    wait = error_answer(429, headers={"Retry-After": "7"})
    scripted.will_answer(wait, error_answer(503, headers={"Retry-After": "86400"}), job_answer())

    scripted.client().jobs.retrieve("job_1")

    assert scripted.pauses == [7, 60]


def test_a_date_in_retry_after_is_taken_by_the_servers_own_clock(
    scripted: "ScriptedServer", error_answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    at = {"Date": "Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2015 07:28:09 GMT"}
    past = {"Retry-After": "Wed, 21 Oct 2015 07:28:09 GMT"}
    future = {"Retry-After": "Wed, 21 Oct 2115 07:28:09 GMT"}
    answers = [error_answer(503, headers=headers) for headers in (at, past, future)]
    scripted.will_answer(*answers, error_answer(503, headers={"Retry-After": "soon"}), job_answer())

    scripted.client(max_retries=4).jobs.retrieve("job_1")

    assert scripted.pauses[:3] == [9, 0, 60]
    assert 0 <= scripted.pauses[3] <= 8


def test_the_server_says_what_is_worth_another_try(
    scripted: "ScriptedServer", error_answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    scripted.will_answer(error_answer(429, headers={"x-should-retry": "false", "Retry-After": "1"}))
    with pytest.raises(errors.Throttled) as raised:
        scripted.client().jobs.retrieve("job_1")
    assert (raised.value.should_retry, len(scripted.requests)) == (False, 1)

    scripted.will_answer(error_answer(409, headers={"x-should-retry": "true"}), job_answer())
    assert scripted.client().jobs.retrieve("job_1").id == "job_1"


def test_a_stream_that_the_server_refuses_for_good_is_not_asked_for_again(
    scripted: "ScriptedServer", error_answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    scripted.will_answer(job_answer(), error_answer(429, headers={"x-should-retry": "false"}))

    with pytest.raises(errors.Throttled):
        list(scripted.client().jobs.follow("job_1"))


def test_a_broken_connection_is_tried_again(
    scripted: "ScriptedServer", answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    scripted.will_answer(answer(cut=0), answer(body=b"{" * 100, cut=10), job_answer())

    assert scripted.client().jobs.retrieve("job_1").id == "job_1"


def test_a_job_is_posted_with_one_idempotency_key_for_all_tries(
    scripted: "ScriptedServer", answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    client = scripted.client()
    scripted.will_answer(answer(cut=0), job_answer())
    client.jobs.create(base_model="org/model", training_file="file_1")
    client.jobs.create(base_model="org/model", training_file="file_1")

    first, again, other = (request.headers["idempotency-key"] for request in scripted.requests)
    assert first == again != other
    assert scripted.requests[1].json == {"base_model": "org/model", "training_file": "file_1"}
    assert scripted.requests[1].headers["authorization"] == "Bearer key"


def test_a_key_is_never_made_twice(scripted: "ScriptedServer", answer: Callable[..., Any]) -> None:
    scripted.will_answer(answer(cut=0))

    with pytest.raises(ConnectionFailed):
        scripted.client().keys.create(name="ci")

    assert len(scripted.requests) == 1


def test_an_answer_that_is_not_ours_says_check_the_address(
    scripted: "ScriptedServer", answer: Callable[..., Any]
) -> None:
    scripted.will_answer(answer(body=b"<html>It works!</html>"))

    with pytest.raises(ConnectionFailed, match="check the address"):
        scripted.client().jobs.retrieve("job_1")


def test_a_redirect_is_not_followed(scripted: "ScriptedServer", answer: Callable[..., Any]) -> None:
    scripted.will_answer(answer(302, headers={"Location": "https://elsewhere/"}))

    with pytest.raises(ConnectionFailed, match="elsewhere"):
        scripted.client(max_retries=0).jobs.retrieve("job_1")


def test_nothing_listens(scripted: "ScriptedServer") -> None:
    scripted.close()

    with pytest.raises(ConnectionFailed, match="Nothing listens") as raised:
        scripted.client(max_retries=0).jobs.retrieve("job_1")

    assert raised.value.refused


def test_a_sequence_gap_tells_where_to_go_on(
    scripted: "ScriptedServer", error_answer: Callable[..., Any]
) -> None:
    scripted.will_answer(error_answer(416, headers={"X-Expected-Seq": "17"}))

    with pytest.raises(SequenceGap) as raised:
        Transport(scripted.url, "key").request("POST", "/x")

    assert raised.value.expected == 17


def test_ids_cannot_change_the_path(scripted: "ScriptedServer", error_answer: Callable[..., Any]) -> None:
    scripted.will_answer(error_answer(404))

    with pytest.raises(errors.NotFound):
        scripted.client().jobs.retrieve("../keys?x=1")

    assert scripted.requests[0].path == "/jobs/..%2Fkeys%3Fx%3D1"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="http://host:port"):
        Transport(url, "key")


def test_a_key_with_a_line_break_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="line breaks"):
        Transport("http://localhost:1", "key\nX-Evil: 1")


def test_nothing_listens_where_every_address_refuses_but_not_where_one_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refusing = free.getsockname()
    silent = socket.create_server(("127.0.0.1", 0), backlog=0)
    held = [socket.socket() for _ in range(4)]
    for connection in held:  # fill the backlog: the next connection is neither taken nor refused
        connection.setblocking(False)
        connection.connect_ex(silent.getsockname())
    no_ipv6 = ("192.0.2.1", 1)
    addresses: list[tuple[str, int]] = []
    monkeypatch.setattr(_transport, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", each) for each in addresses]
    )
    monkeypatch.setattr(
        _transport,
        "_refuses",
        lambda family, address, real=_transport._refuses: (
            None if address == no_ipv6 else real(family, address)
        ),
    )
    transport = Transport("http://box:1", None)

    for addresses[:], nothing in (
        ([refusing], True),
        ([no_ipv6, refusing], True),
        ([no_ipv6], False),
        ([silent.getsockname(), refusing], False),
        ([refusing, silent.getsockname()], False),
    ):
        assert transport.nothing_listens() is nothing, addresses

    transport.close()
    for opened in (*held, silent):
        opened.close()
