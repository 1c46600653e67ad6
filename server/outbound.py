"""Connections to hosts that clients name: to public addresses only, unless the operator allows others.

A server that connects to any URL can be made to reach into its own network (SSRF). So the host name is resolved here,
every address is checked, and the connection goes to the address that was checked, without a second look-up. No redirect
is followed here, and proxies from the environment are not used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from urllib.parse import quote, urlsplit

UNQUOTED = "/?%:@!$&'()*+,;=~-._"  # in a path with its query; RFC 3986, 3.3 and 3.4
PORTS: Mapping[str, int] = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Unreachable(Exception):
    """The host cannot be used. The message is for the client, and tells nothing about this network."""


class NotPublic(Unreachable):
    """The host has an address that is not on the public internet."""

    def __init__(self) -> None:
        super().__init__("its host is not on the public internet")


def is_public(address: Address) -> bool:
    """Whether the address is on the public internet; an IPv4 address inside an IPv6 address is checked too."""
    if isinstance(address, ipaddress.IPv6Address):
        inside = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in NAT64:
            inside.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(inner is not None and not is_public(inner) for inner in inside):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast


def resolve(host: str, port: int, *, private: bool = False) -> list[tuple[socket.AddressFamily, str]]:
    """The addresses of the host. Raises `Unreachable` if there are none; `NotPublic` unless `private` ones may be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Unreachable("its host name cannot be resolved") from None
    places: list[tuple[socket.AddressFamily, str]] = [(family, str(sockaddr[0])) for family, _, _, _, sockaddr in found]
    if not private and not all(is_public(ipaddress.ip_address(place.partition("%")[0])) for _, place in places):
        raise NotPublic
    return places


class Exchange:
    """Requests that together may take `seconds` from the first one on.

    They run in a thread; `abort`, called from another one, ends them.
    """

    def __init__(self, seconds: float, *, private: bool = False) -> None:
        self._seconds = seconds
        self._private = private
        self._until: float | None = None
        self._socket: socket.socket | None = None
        self._aborted = False

    def abort(self) -> None:
        self._aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The reply, with its body unread. Raises `Unreachable`, or what `http.client` does."""
        if self._until is None:
            self._until = time.monotonic() + self._seconds
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or PORTS[parts.scheme]
        except (KeyError, ValueError):
            raise Unreachable("only http:// and https:// addresses are fetched") from None
        if not host:
            raise Unreachable("its address names no host")
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = PORTS[parts.scheme]  # not said in `host`, which may be signed: S3's signatures are
        connection.sock = self._connect(host, port, encrypted=parts.scheme == "https")
        with contextlib.closing(connection):
            path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=UNQUOTED)
            connection.request(method, path, body, dict(headers))
            with contextlib.closing(connection.getresponse()) as reply:
                yield reply

    def left(self) -> float:
        """The seconds that are left. Raises `Unreachable` if none are."""
        left = self._seconds if self._until is None else self._until - time.monotonic()
        if left <= 0:
            raise Unreachable(f"it did not arrive within {self._seconds:.0f} s")
        return left

    def _connect(self, host: str, port: int, encrypted: bool) -> socket.socket:
        failure: OSError = OSError("no address")
        for family, place in resolve(host, port, private=self._private):
            if self._aborted:
                break
            self._socket = plain = socket.socket(family, socket.SOCK_STREAM)
            plain.settimeout(self.left())
            try:
                plain.connect((place, port))
                if encrypted:
                    self._socket = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
                return self._socket
            except OSError as error:
                plain.close()
                failure = error
        raise failure
