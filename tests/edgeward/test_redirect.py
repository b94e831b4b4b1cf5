"""Where a client lets itself be sent for an artifact, and what it takes along."""

from __future__ import annotations

import pytest

from edgeward.client import redirect
from edgeward.errors import Unavailable

SIGNED = "https://s3.plant/b/k?X-Amz-Credential=id&X-Amz-Signature=0123abcd"


@pytest.mark.parametrize(
    ("base", "location", "expected"),
    [
        ("https://c", SIGNED, SIGNED),
        ("http://127.0.0.1:1", "http://127.0.0.1:2/b/k?X-Amz-Signature=1", "http://127.0.0.1:2/b/k?X-Amz-Signature=1"),
        ("http://c", SIGNED, SIGNED),
        ("https://c/base", "/b/k", "https://c/b/k"),
    ],
)  # fmt: skip
def test_one_may_be_sent_to_a_server_that_is_protected_as_well(
    base: str, location: str, expected: str
) -> None:
    assert redirect.target(base, location) == expected


@pytest.mark.parametrize(
    "location",
    [
        SIGNED.replace("https:", "http:"),
        "file:///etc/passwd?X-Amz-Signature=0123abcd",
        "https://user:0123abcd@s3.plant/k",
        "https://s3.plant:0/?X-Amz-Signature=0123abcd",
        "https://s3.plant:99999/?X-Amz-Signature=0123abcd",
        "https://s3.plant/\n0123abcd",
        "https://s3.plänt/0123abcd",
        "https://[s3/0123abcd",
        "",
        None,
    ],
)
def test_one_goes_nowhere_else_and_does_not_say_what_was_signed(location: str | None) -> None:
    with pytest.raises(Unavailable) as problem:
        redirect.target("https://controller", location)
    assert "0123abcd" not in str(problem.value)


def test_only_the_part_that_is_wanted_goes_along() -> None:
    headers = {"Range": "bytes=5-", "If-Range": '"x"', "Authorization": "Bearer t", "Cookie": "a=b"}
    assert redirect.forwarded(headers | {"accept-encoding": "identity"}) == {
        "Range": "bytes=5-",
        "accept-encoding": "identity",
    }


def test_what_is_signed_is_cut_from_texts() -> None:
    assert (
        redirect.without_queries(f'GET {SIGNED} "HTTP/1.1 200"')
        == 'GET https://s3.plant/b/k?... "HTTP/1.1 200"'
    )
    assert (
        redirect.without_queries(f"(b'Location', b'{SIGNED}'), x")
        == "(b'Location', b'https://s3.plant/b/k?...'), x"
    )
    assert redirect.without_queries("GET http://c/a?wait=3 yes") == "GET http://c/a?wait=3 yes"
