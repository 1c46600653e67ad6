"""Fetches a picture from the internet for a client, from public addresses only; each redirect is checked again."""

import http.client
from urllib.parse import urljoin

from pipelines.image_formats import IMAGE_FORMATS
from server.outbound import Exchange, NotPublic, Unreachable
from server.process.threads import ThreadPools

MAX_BYTES = 50 * 2**20
SECONDS = 10.0  # time limit of a whole download
LATE = f"it did not arrive within {SECONDS:.0f} s"
REDIRECTS = 3
CHUNK = 2**16
HEADERS = {
    "accept": ", ".join(row.content_type for row in IMAGE_FORMATS.values()),
    "user-agent": "srpo-server (fetches source pictures for its users)",  # some hosts refuse whoever sends none
}


class Unfetchable(Exception):
    """The picture cannot be fetched. The message is for the client, and tells nothing about this network."""


class Download:
    """One download, which runs in a thread; `abort`, called from another thread, ends it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._exchange = Exchange(SECONDS)
        self.abort = self._exchange.abort

    def run(self) -> bytes:
        """The body of a 200, after at most three redirects. Raises `Unfetchable`."""
        url = self._url
        for _ in range(REDIRECTS + 1):
            try:
                done = self._get(url)
            except NotPublic as error:
                raise Unfetchable(f"{error}; send it as a data URI") from None
            except Unreachable as error:
                raise Unfetchable(str(error)) from None
            except TimeoutError:  # the socket's, which has the seconds that are left
                raise Unfetchable(LATE) from None
            except (OSError, http.client.HTTPException, ValueError):  # ValueError: no host, path or port at all
                raise Unfetchable("it could not be fetched") from None
            if isinstance(done, bytes):
                return done
            url = urljoin(url, done)
        raise Unfetchable(f"it redirects more than {REDIRECTS} times")

    def _get(self, url: str) -> bytes | str:
        """The body as bytes, or the address of a redirect as text."""
        with self._exchange.request("GET", url, HEADERS) as reply:
            if reply.status in (301, 302, 303, 307, 308) and (location := reply.getheader("location")):
                return location
            if reply.status != 200:
                raise Unfetchable(f"its host answered {reply.status}")
            return self._read(reply)

    def _read(self, reply: http.client.HTTPResponse) -> bytes:
        body = bytearray()
        while chunk := reply.read1(CHUNK):
            body += chunk
            self._exchange.left()
            if len(body) > MAX_BYTES:
                raise Unfetchable(f"it is larger than {MAX_BYTES >> 20} MiB")
        if reply.length:  # the connection ended early, which read1 does not report
            raise Unfetchable("it arrived only in part")
        return bytes(body)


async def fetch(url: str, threads: ThreadPools) -> bytes:
    """The picture's bytes, at most 50 MiB, within 10 s of its turn. Raises `Unfetchable`."""
    download = Download(url)
    try:
        return await threads.run_within(SECONDS, "fetching", download.run)
    except TimeoutError:
        raise Unfetchable(LATE) from None
    finally:
        download.abort()
