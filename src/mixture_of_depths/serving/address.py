"""The address that a server listens on."""

import errno
import socket
from contextlib import ExitStack
from ipaddress import ip_address


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on an address, one for each that the name of the host stands for.

    Raises:
        ValueError: when it cannot be listened on; names the host where that is to blame, and the port otherwise.
    """
    if not host:
        raise ValueError("host='' is empty; name an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all")
    elsewhere = f"host={host} cannot be listened on; name an address of this machine, such as 127.0.0.1"
    if host == "*":
        # Python takes it for all addresses, which nothing else does.
        raise ValueError(elsewhere)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        # The second is for what no name of a host can be.
        raise ValueError(elsewhere) from error
    with ExitStack() as opened:
        sockets, missing = [], None
        for family, *_, address in dict.fromkeys(found):
            try:
                sockets.append(opened.enter_context(socket.create_server(address, family=family)))
            except OSError as error:
                # A name may stand for an address that this machine lacks, such as that of IPv6, beside one it has.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise ValueError(
                        f"port={port} of host={host} cannot be listened on; name one that is free"
                    ) from error
                missing = error
        if not sockets:
            raise ValueError(elsewhere) from missing
        opened.pop_all()
    return sockets


def check_address(host: str, port: int) -> None:
    """Listens on an address for a moment.

    Raises:
        ValueError: when it cannot be listened on; names the host where that is to blame, and the port otherwise.
    """
    for opened in listen(host, port):
        opened.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return all(ip_address(address[0]).is_loopback for *_, address in socket.getaddrinfo(host, None))
