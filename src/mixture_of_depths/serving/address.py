"""The address that a server listens on."""

import errno
import socket
from ipaddress import ip_address


def check_address(host: str, port: int) -> None:
    """Listens on an address for a moment.

    Raises:
        ValueError: when it cannot be listened on; names the host where that is to blame, and the port otherwise.
    """
    if not host:
        raise ValueError("host='' is empty; name an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all")
    elsewhere = f"host={host} cannot be listened on; name an address of this machine, such as 127.0.0.1"
    try:
        socket.getaddrinfo(host, port)
    except (socket.gaierror, UnicodeError) as error:
        # The second is for what no name of a host can be.
        raise ValueError(elsewhere) from error
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        # The second is for a name that is looked up and not bound, as "*" is.
        if error.errno in (errno.EADDRNOTAVAIL, socket.EAI_NONAME):
            raise ValueError(elsewhere) from error
        raise ValueError(f"port={port} of host={host} cannot be listened on; name one that is free") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return all(ip_address(address[0]).is_loopback for *_, address in socket.getaddrinfo(host, None))
