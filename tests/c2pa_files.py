"""A certificate that signs C2PA manifests in tests, and the official readers of manifests and watermarks."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from imwatermark import WatermarkDecoder

from tdm_runtime.media.provenance import MIME_TYPES, RECEIPT_LABEL
from tdm_runtime.media.watermark import MESSAGE, METHOD
from tdm_runtime.model.decoder import Pixels


@dataclass(frozen=True)
class Credentials:
    """Files of `--c2pa-cert` and `--c2pa-key`, and the certificate of the issuer in PEM."""

    cert: Path
    key: Path
    root: str

    @property
    def arguments(self) -> list[str]:
        return ["--c2pa-cert", str(self.cert), "--c2pa-key", str(self.key)]

    def manifest(self, content: bytes, file_format: str) -> dict[str, Any]:
        """Return the manifest of a file, which must be valid and of our certificate."""
        trust = {"trust": {"trust_anchors": self.root}, "verify": {"verify_trust": True}}
        context = c2pa.Context(c2pa.Settings.from_dict(trust))
        with c2pa.Reader(MIME_TYPES[file_format], io.BytesIO(content), context=context) as reader:
            assert reader.get_validation_state() == "Trusted", reader.get_validation_results()
            manifest: dict[str, Any] = reader.get_active_manifest()
        return manifest

    def actions(self, content: bytes, file_format: str) -> list[dict[str, Any]]:
        """Return the actions in the manifest of a file."""
        actions: list[dict[str, Any]] = assertion(self.manifest(content, file_format), "c2pa.actions.v2")["actions"]
        return actions


def assertion(manifest: dict[str, Any], label: str) -> dict[str, Any]:
    (found,) = (one["data"] for one in manifest["assertions"] if one["label"] == label)
    return dict(found)


def receipt_in(manifest: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(assertion(manifest, RECEIPT_LABEL)["receipt"]))


def message_in(pixels: Pixels) -> bytes:
    """Return what their own decoder reads in pixels, uint8 [H, W, 3]."""
    found: bytes = WatermarkDecoder("bytes", 8 * len(MESSAGE)).decode(np.ascontiguousarray(pixels[..., ::-1]), METHOD)
    return found


def write_credentials(folder: Path) -> Credentials:
    """Write a certificate, that of its issuer, and its key."""
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _certificate("root", root_key, root_key)
    chain = [_certificate("tdm-serve tests", key, root_key), root]
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in chain))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return Credentials(cert_file, key_file, root.public_bytes(Encoding.PEM).decode())


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    is_root, now = key is issuer_key, datetime.now(UTC)
    usage = x509.KeyUsage(not is_root, False, False, False, False, is_root, is_root, False, False)
    public, issuer = key.public_key(), issuer_key.public_key()
    builder = (
        x509.CertificateBuilder(_name("root"), _name(name), public, x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(is_root, None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
    )
    if not is_root:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(name: str) -> x509.Name:
    names = {NameOID.ORGANIZATION_NAME: "tdm-serve", NameOID.COMMON_NAME: name}
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in names.items()])
