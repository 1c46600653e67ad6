"""Fetches a picture from the internet for a client, from public addresses only.

A server that fetches any URL can be made to read from its own network (SSRF). So the host name is resolved here, every
address is checked, and the connection goes to the address that was checked, without a second look-up. Each redirect is
checked in the same way. Proxies from the environment are not used.
"""

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import quote, urljoin, urlsplit

from server.threads import ThreadPools

MAX_BYTES = 50 * 2**20
SECONDS = 10.0  # time limit of a whole download
REDIRECTS = 3
CHUNK = 2**16
UNQUOTED = "/?%:@!$&'()*+,;=~-._"  # in a path with its query; RFC 3986, 3.3 and 3.4
NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Unfetchable(Exception):
    """The picture cannot be fetched. The message is for the client, and tells nothing about this network."""


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


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """The addresses of the host. Raises `Unfetchable` if there are none, or if one is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Unfetchable("its host name cannot be resolved") from None
    places: list[tuple[socket.AddressFamily, str]] = [(family, str(sockaddr[0])) for family, _, _, _, sockaddr in found]
    if not all(is_public(ipaddress.ip_address(place.partition("%")[0])) for _, place in places):
        raise Unfetchable("its host is not on the public internet; send it as a data URI")
    return places


class Download:
    """One download, which runs in a thread; `abort`, called from another thread, ends it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._until = time.monotonic() + SECONDS
        self._socket: socket.socket | None = None
        self._aborted = False

    def abort(self) -> None:
        self._aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> bytes:
        """The body of a 200, after at most three redirects. Raises `Unfetchable`."""
        url = self._url
        for _ in range(REDIRECTS + 1):
            try:
                done = self._get(url)
            except (OSError, http.client.HTTPException, ValueError):  # ValueError: no host, path or port at all
                raise Unfetchable("it could not be fetched") from None
            if isinstance(done, bytes):
                return done
            url = urljoin(url, done)
        raise Unfetchable(f"it redirects more than {REDIRECTS} times")

    def _get(self, url: str) -> bytes | str:
        """The body as bytes, or the address of a redirect as text."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (KeyError, ValueError):
            raise Unfetchable("only http:// and https:// addresses are fetched") from None
        if not host:
            raise Unfetchable("its address names no host")
        connection = http.client.HTTPConnection(host, port)
        connection.sock = self._connect(host, port, encrypted=parts.scheme == "https")
        with contextlib.closing(connection):
            path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=UNQUOTED)
            connection.request("GET", path, headers={"accept": "image/png, image/jpeg, image/webp"})
            with contextlib.closing(connection.getresponse()) as reply:
                if reply.status in (301, 302, 303, 307, 308) and (location := reply.getheader("location")):
                    return location
                if reply.status != 200:
                    raise Unfetchable(f"its host answered {reply.status}")
                return self._read(reply)

    def _connect(self, host: str, port: int, encrypted: bool) -> socket.socket:
        failure: OSError = OSError("no address")
        for family, place in resolve(host, port):
            if self._aborted:
                break
            self._socket = plain = socket.socket(family, socket.SOCK_STREAM)
            plain.settimeout(self._left())
            try:
                plain.connect((place, port))
                if encrypted:
                    self._socket = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
                return self._socket
            except OSError as error:
                plain.close()
                failure = error
        raise failure

    def _read(self, reply: http.client.HTTPResponse) -> bytes:
        body = bytearray()
        while chunk := reply.read1(CHUNK):
            body += chunk
            self._left()
            if len(body) > MAX_BYTES:
                raise Unfetchable(f"it is larger than {MAX_BYTES >> 20} MiB")
        if reply.length:  # the connection ended early, which read1 does not report
            raise Unfetchable("it arrived only in part")
        return bytes(body)

    def _left(self) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise Unfetchable(f"it did not arrive within {SECONDS:.0f} s")
        return left


async def fetch(url: str, pools: ThreadPools) -> bytes:
    """The picture's bytes, at most 50 MiB, within 10 s. Raises `Unfetchable`."""
    download = Download(url)
    try:
        async with asyncio.timeout(SECONDS):
            return await pools.run("fetching", download.run)
    except TimeoutError:
        raise Unfetchable(f"it did not arrive within {SECONDS:.0f} s") from None
    finally:
        download.abort()
