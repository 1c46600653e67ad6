"""Signed provenance by C2PA (https://spec.c2pa.org), for an operator with a certificate. Needs the extra `c2pa`.

A signature covers every byte of the file, so it is written last. It holds a new id, so signed files of the same request
differ. No timestamp service is used: no data leaves this machine.
"""

import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from server.extras import missing_extra
from server.images.metadata import SOURCE_TYPE
from weights.version import read_version

INSTALL = missing_extra("C2PA", "c2pa")
SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}  # a thumbnail would add 400 kB to each file


@dataclass(frozen=True, slots=True)
class Signature:
    """The signature in a file's manifest. `state` is Invalid, Valid (the signer is unknown) or Trusted."""

    state: str
    issuer: str


class FileSigner:
    """Signs files with the operator's certificate chain and key, both PEM. Raises `ValueError` if they do not work."""

    def __init__(self, certificate: Path, key: Path, algorithm: str) -> None:
        try:
            import c2pa
        except ModuleNotFoundError:
            raise ValueError(INSTALL) from None
        self._c2pa: Any = c2pa
        self._lock = Lock()  # the library's signer serves one thread at a time
        try:
            info = c2pa.C2paSignerInfo(algorithm.encode(), certificate.read_bytes(), key.read_bytes(), None)
            self._signer: Any = c2pa.Signer.from_info(info)
            self._context: Any = c2pa.Context.from_dict(SETTINGS)
            self._test_signature()
        except c2pa.C2paError as error:
            raise ValueError(f"{certificate} and {key} cannot sign ({algorithm}): {error}") from error

    def sign(self, data: bytes, content_type: str, model: str) -> bytes:
        """The file with a signed manifest, which says that `model` generated the image."""
        name, release = "srpo-server", read_version()
        action = {
            "action": "c2pa.created",
            "digitalSourceType": SOURCE_TYPE,
            "softwareAgent": {"name": model, "version": release},
        }
        manifest = {
            "claim_generator_info": [{"name": name, "version": release}],
            "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        with self._lock, self._c2pa.Builder(json.dumps(manifest), self._context) as builder:
            builder.sign(self._signer, content_type, io.BytesIO(data), signed)
        return signed.getvalue()

    def _test_signature(self) -> None:
        """Sign a picture of one pixel and read it back, so that a key of another certificate is an error at start."""
        with io.BytesIO() as file:
            Image.new("RGB", (1, 1)).save(file, "png")
            signature = read_signature(self.sign(file.getvalue(), "image/png", "none"), "image/png")
        if signature is None or signature.state == "Invalid":
            raise ValueError("the certificate and the key do not belong together")


@cache
def load_signer(certificate: Path, key: Path, algorithm: str) -> FileSigner:
    """The signer for these files, loaded and tested once."""
    return FileSigner(certificate, key, algorithm)


def read_signature(data: bytes, content_type: str, trust: Path | None = None) -> Signature | None:
    """The file's signature, None if it has none. `trust` is a PEM file of roots to trust. Raises `ValueError`."""
    try:
        import c2pa
    except ModuleNotFoundError:
        if contains_c2pa(data):
            raise ValueError(f"the file is signed. {INSTALL}") from None
        return None
    settings: dict[str, Any] = {"verify": {"remote_manifest_fetch": False}}
    if trust is not None:
        settings["trust"] = {"user_anchors": trust.read_text()}
    try:
        context: Any = c2pa.Context.from_dict(settings)
        reader: Any = c2pa.Reader.try_create(content_type, io.BytesIO(data), context=context)
        if reader is None:
            return None
        with reader:
            manifest = reader.get_active_manifest() or {}
            return Signature(reader.get_validation_state(), manifest.get("signature_info", {}).get("issuer", "unknown"))
    except c2pa.C2paError:  # a damaged manifest, or a file that is no image
        return Signature("Invalid", "unknown") if contains_c2pa(data) else None


def contains_c2pa(data: bytes) -> bool:
    """Whether the file contains a C2PA box, intact or not."""
    return b"jumb" in data and b"c2pa" in data
