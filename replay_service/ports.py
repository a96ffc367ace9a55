"""Whether a port can be listened at, asked before anything depends on it; what to say if not."""

from __future__ import annotations

import errno
import socket

from replay_service.errors import ReplayConfigError


def require_free_port(host: str, port: int, flag: str, remedy: str = "choose another port") -> None:
    """Try to listen at an address of this machine.

    Args:
        host: address or name.
        port: above 0.
        flag: that the user sets it with.
        remedy: what else to do about a port that is taken.

    Raises:
        ReplayConfigError: another process listens there, or this machine cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            # As the servers do: connections that have just ended keep nobody out.
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        raise cannot_listen(error, host, port, flag, remedy) from error


def cannot_listen(
    error: OSError, host: str, port: int, flag: str, remedy: str = "choose another port"
) -> ReplayConfigError:
    """Return what to tell the user about a failure to listen; arguments as above."""
    if error.errno == errno.EADDRINUSE:
        return ReplayConfigError(
            f"port {port} of {flag} is in use: another process listens at {host}:{port}; stop "
            f"it, or {remedy}"
        )
    return ReplayConfigError(
        f"nothing can listen at {host}:{port}, given with {flag}: {error.strerror or error}; "
        "give an address of this machine and a port that you may use"
    )
