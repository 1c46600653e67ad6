"""Signed provenance by C2PA (https://spec.c2pa.org), where the operator has a certificate. Needs the extra `c2pa`.

A signature covers every byte of the file, so it is the last thing written. It holds a fresh id: signed files of the
same request differ. No timestamp service is asked; nothing leaves this machine.
"""

import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from server.images.metadata import SOURCE_TYPE

INSTALL = "C2PA needs its extra: pip install 'srpo-server[c2pa]'"
SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}  # a thumbnail would add 400 kB to each file


@dataclass(frozen=True, slots=True)
class Signature:
    """What a file's manifest proves. `state` is Invalid, Valid (by an unknown signer) or Trusted."""

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
        """The same file with a signed manifest: made by `model`, with a generative method."""
        name, release = "srpo-server", version("srpo-server")
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
        """Sign a picture of one pixel and read it back: a key of another certificate is an error at start."""
        with io.BytesIO() as file:
            Image.new("RGB", (1, 1)).save(file, "png")
            signature = read_signature(self.sign(file.getvalue(), "image/png", "none"), "image/png")
        if signature is None or signature.state == "Invalid":
            raise ValueError("the certificate and the key do not belong together")


@cache
def load_signer(certificate: Path, key: Path, algorithm: str) -> FileSigner:
    """One signer for each set of files, proved once."""
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
    except c2pa.C2paError:  # of the manifest; or of a file that is none
        return Signature("Invalid", "unknown") if contains_c2pa(data) else None


def contains_c2pa(data: bytes) -> bool:
    """Whether there is a box of C2PA's in the file, sound or not."""
    return b"jumb" in data and b"c2pa" in data
