"""TLS in front of the server: a certificate for this machine, and the proxies of deploy/ with it."""

import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.server import free_port
from support.waiting import LIMIT, within

CADDYFILE = Path(__file__).parents[2] / "deploy" / "caddy" / "Caddyfile"
HOST = "127.0.0.1"


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    return paths


@contextmanager
def running_caddy(folder: Path, port: int, server: int) -> Iterator[Path]:
    """The example's Caddy on `port` before `server`. Its certificate."""
    certificate, key = make_certificate(folder)
    text = CADDYFILE.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{server}")
    options = f"{{\n\tadmin localhost:{free_port()}\n\tauto_https off\n\tstorage file_system {folder}/storage\n}}\n"
    text = text.replace("your-host.example {\n", f"https://{HOST}:{port} {{\n\ttls {certificate} {key}\n", 1)
    (folder / "Caddyfile").write_text(options + text)
    with (folder / "log").open("wb") as log:
        command = ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={"HOME": str(folder)})
    try:
        assert within(LIMIT, lambda: answers(port, certificate)), (folder / "log").read_text()
        yield certificate
    finally:
        process.terminate()
        process.wait(LIMIT)


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def answers(port: int, certificate: Path) -> bool:
    try:
        return httpx.get(f"https://{HOST}:{port}/health", verify=trusting(certificate)).status_code == 200
    except httpx.TransportError:
        return False
