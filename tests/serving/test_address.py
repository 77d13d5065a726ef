"""What cannot be listened on is told by the part of the address that is to blame."""

import re
import socket

import pytest

from mixture_of_depths.serving.address import check_address, is_loopback, listen


# The second is kept for documentation: no machine has it.
@pytest.mark.parametrize("host", ["999.1.1.1", "192.0.2.1", "::zz", "a" * 70, "*"])
def test_a_host_that_is_not_this_machine_is_refused_by_name(host: str) -> None:
    with pytest.raises(ValueError, match=f"^host={re.escape(host)} cannot be listened on; name an address of this"):
        check_address(host, 0)


def test_a_port_that_is_taken_is_refused_by_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"^port={port} of host=127.0.0.1 cannot be listened on"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", 0)


def test_nobody_else_can_listen_on_an_address_that_is_listened_on() -> None:
    (held,) = listen("127.0.0.1", 0)
    with held, pytest.raises(ValueError, match=r"cannot be listened on; name one that is free$"):
        listen("127.0.0.1", held.getsockname()[1])


def test_a_name_is_listened_on_at_all_its_addresses_that_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second is kept for documentation: no machine has it.
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("127.0.0.1", "192.0.2.1", "127.0.0.2")]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    sockets = listen("name", 0)
    assert [one.getsockname()[0] for one in sockets] == ["127.0.0.1", "127.0.0.2"]
    for one in sockets:
        one.close()


def test_only_this_machine_reaches_a_loopback_address() -> None:
    hosts = ("127.0.0.1", "localhost", "::1", "0.0.0.0")
    assert [is_loopback(host) for host in hosts] == [True, True, True, False]


def test_a_host_that_is_left_empty_does_not_open_the_server_to_all() -> None:
    with pytest.raises(ValueError, match=r"^host='' is empty; name an address"):
        check_address("", 0)
