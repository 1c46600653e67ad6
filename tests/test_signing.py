"""C2PA: signed last with the operator's certificate, read back, and broken by one flipped byte."""

import datetime
import io
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image
from pydantic import ValidationError
from support.canaries import SLOTS, post

from server.__main__ import main as srpo
from server.engine_setup import build_signer
from server.settings.server import Settings

pytest.importorskip("c2pa", reason="c2pa-python has no wheel for this machine")


def certificate(subject: str, key: Any, issuer: str, issuer_key: Any, ca: bool) -> bytes:
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder(name(issuer), name(subject), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
        .add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), True)
    )
    if not ca:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chain.pem, key.pem and root.pem of an operator with an own root; other.pem is a stranger's key and root."""
    folder = tmp_path_factory.mktemp("pki")
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "leaf", "other")}
    root = certificate("root", keys["root"], "root", keys["root"], True)
    leaf = certificate("Operator of the tests", keys["leaf"], "root", keys["root"], False)
    (folder / "chain.pem").write_bytes(leaf + root)
    (folder / "root.pem").write_bytes(root)
    (folder / "stranger.pem").write_bytes(certificate("other", keys["other"], "other", keys["other"], True))
    for file, name in (("key.pem", "leaf"), ("other.pem", "other")):
        (folder / file).write_bytes(
            keys[name].private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return folder


async def signed(tmp_path: Path, pki: Path, slots: tuple[bool, ...] = (False,), **options: Any) -> list[bytes]:
    pair: dict[str, Any] = {"c2pa_certificate": pki / "chain.pem", "c2pa_key": pki / "key.pem"}
    reply = await post(tmp_path, slots, **pair, **options)
    assert reply.status_code == 201, reply.text
    return list(reply.extensions["fetched"])


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
async def test_a_signed_file_is_read_back_and_one_flipped_byte_breaks_it(
    tmp_path: Path, pki: Path, format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*arguments: object) -> int:
        return srpo(["verify", *map(str, arguments)])

    (data,) = await signed(tmp_path, pki, output_format=format)
    (unsigned,) = (await post(tmp_path, (False,), output_format=format)).extensions["fetched"]
    assert 0 < len(data) - len(unsigned) < 10_000
    with Image.open(io.BytesIO(data)) as ours, Image.open(io.BytesIO(unsigned)) as bare:
        assert ours.tobytes() == bare.tobytes()
    file = tmp_path / f"signed.{format}"
    file.write_bytes(data)
    assert verify(file) == 0
    assert "unbroken, by Operator of the tests, who is not known here" in capsys.readouterr().out
    assert verify("--trust", pki / "root.pem", file) == 0
    assert "who is trusted" in capsys.readouterr().out
    assert verify("--trust", pki / "stranger.pem", file) == 1
    picture = bytearray(data)
    picture[len(unsigned) // 2 if format == "webp" else -200] ^= 1  # in the pixels: WebP has the manifest at the end
    file.write_bytes(picture)
    assert verify(file) == 1
    assert "broken: the file is not what was signed" in capsys.readouterr().out
    file.write_bytes(unsigned)
    assert verify(file) == 0
    assert verify("--trust", pki / "root.pem", file) == 1
    for pem, complaint in ((file, "holds no certificate"), (tmp_path / "no.pem", "No such file")):
        assert verify("--trust", pem, file) == 2
        assert complaint in capsys.readouterr().err


async def test_a_withheld_image_is_not_claimed_to_be_drawn(tmp_path: Path, pki: Path) -> None:
    files = await signed(tmp_path, pki, SLOTS)
    assert [b"c2pa" in data for data in files] == [not bad for bad in SLOTS]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"c2pa_key": "other.pem"}, "sign|belong"),
        ({"c2pa_certificate": "key.pem"}, "cannot sign"),
        ({"c2pa_key": "no"}, "no"),
    ],
)
def test_a_certificate_that_does_not_work_is_refused_at_the_start(
    pki: Path, change: dict[str, str], complaint: str
) -> None:
    names = {"c2pa_certificate": "chain.pem", "c2pa_key": "key.pem"} | change
    files: dict[str, Any] = {name: pki / file for name, file in names.items()}
    settings = Settings(**files)
    with pytest.raises((ValueError, OSError), match=complaint):
        build_signer(settings)


def test_a_certificate_without_its_key_is_refused(pki: Path) -> None:
    with pytest.raises(ValidationError, match="both"):
        Settings(c2pa_certificate=pki / "chain.pem")
