"""The operator's own moderation service, called over HTTP. Any reply without a clear verdict is a failure.

POST, application/json: `{"type": "image", "image": "data:image/png;base64,..."}` or
`{"type": "prompt", "prompt": "..."}`. Reply: 200 and `{"flagged": true}` or `{"flagged": false}`; other fields are
ignored. Redirects and proxies are not followed: pictures and prompts go to the configured address and nowhere else.
"""

import base64
import http.client
import io
import json
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from pipelines.errors import SafetyUnavailable

READ_TIMEOUT = 5.0  # seconds without a byte; the whole check is limited by SRPO_SAFETY_TIMEOUT
MAX_REPLY = 2**16


class Hook:
    """One moderation endpoint. `user:password@` in the URL becomes basic authorization."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a moderation hook needs a URL that begins with http:// or https://")
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = {"content-type": "application/json"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        self.name = f"hook ({parts.hostname})"

    def flags(self, question: dict[str, Any]) -> bool:
        """The service's verdict. Raises `SafetyUnavailable`. Blocks."""
        connection = self._connect(self._host, self._port, timeout=READ_TIMEOUT)
        try:
            connection.request("POST", self._path, json.dumps(question), self._headers)
            reply = connection.getresponse()
            status, body = reply.status, reply.read(MAX_REPLY)
            flagged = json.loads(body)["flagged"] if status == 200 else None
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise SafetyUnavailable(f"{self.name}: {type(error).__name__}") from error
        finally:
            connection.close()
        if not isinstance(flagged, bool):
            raise SafetyUnavailable(f"{self.name}: status {status}, no verdict")
        return flagged


class ImageHook(Hook):
    """The moderation service as a checker: its verdict is a score of 1 or 0."""

    def score(self, picture: Image.Image) -> float:
        with io.BytesIO() as file:
            picture.save(file, "png", compress_level=1)
            data = base64.b64encode(file.getvalue()).decode()
        return float(self.flags({"type": "image", "image": f"data:image/png;base64,{data}"}))

    def self_test(self) -> None:
        """One plain grey picture: the service is there and answers."""
        self.score(Image.new("RGB", (64, 64), "grey"))


class PromptHook(Hook):
    """The moderation service for prompts."""

    def __call__(self, prompt: str) -> bool:
        return self.flags({"type": "prompt", "prompt": prompt})
