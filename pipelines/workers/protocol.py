"""Messages on the pipe between the pool and a worker: a small JSON header, then raw bytes.

Layout: header length (4 bytes), payload length (8 bytes), both little-endian unsigned, header (UTF-8 JSON), payload.
"""

import json
import struct
from typing import Any, NamedTuple

PREFIX = struct.Struct("<IQ")


class Message(NamedTuple):
    header: dict[str, Any]
    payload: bytes = b""

    def encode(self) -> bytes:
        """Prefix and header; the payload follows on the wire as it is."""
        text = json.dumps(self.header, separators=(",", ":")).encode()
        return PREFIX.pack(len(text), len(self.payload)) + text

    @classmethod
    def decode(cls, header: bytes, payload: bytes) -> "Message":
        return cls(json.loads(header), payload)
