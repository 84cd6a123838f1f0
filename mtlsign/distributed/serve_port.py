"""Reservation of the port of the HTTP proxy, before Ray starts."""

from __future__ import annotations

import socket

from mtlsign.errors import ClusterError


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind the port of the HTTP proxy without listening on it, so that a second service is refused.

    Ray's proxy binds with SO_REUSEPORT: the kernel would divide the connections between two services. The
    returned socket has that option, too, so the proxy can bind while this process holds the port.

    Args:
        host: address of the proxy.
        port: its port.

    Returns:
        The bound socket. Close it after the service has stopped.

    Raises:
        ClusterError: another program uses the port, or this process must not bind it.
    """
    reserved = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:  # SO_REUSEADDR ignores closing connections only
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        reserved = socket.socket(family, kind, protocol)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
    except PermissionError:
        message = f"This user must not listen on port {port}. Choose a port from 1024 with --port."
        raise ClusterError(message, field="port") from None
    except OSError as error:
        if reserved is not None:
            reserved.close()
        reason = error.strerror or type(error).__name__
        message = (
            f"The service cannot listen on {host}:{port} ({reason}). "
            "Stop the program that uses the port, or choose another with --port or --host."
        )
        raise ClusterError(message, field="port") from None
    return reserved
