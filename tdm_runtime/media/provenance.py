"""Provenance: a C2PA manifest in files and an invisible watermark in pixels, which say that a model made them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from tdm_runtime.media.receipt import Receipt
from tdm_runtime.media.watermark import MIN_PIXELS, REMEDY, Watermark, open_encoder, watermark_of, with_watermark
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import SamplingParams
from tdm_runtime.version import package_version

ProvenanceKind = Literal["c2pa", "watermark"]
MIME_TYPES: Mapping[str, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "mp4": "video/mp4",
}
"""File formats that hold a manifest."""
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
RECEIPT_LABEL = "tdm-serve.receipt"
"""Label of the assertion with the receipt, as text: readers take short lists of JSON for bytes."""
SETTINGS = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"verify_after_sign": False}}
"""Settings of the C2PA library. A thumbnail would take hundreds of kilobytes and most of the time."""
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
"""Elliptic curve -> its signature algorithm, as the C2PA library names it."""


@dataclass(frozen=True)
class ProvenanceConfig:
    """What files and pixels say about their origin."""

    kinds: tuple[ProvenanceKind, ...] = ()
    c2pa_cert: Path | None = None
    """PEM file of the certificates that sign manifests: the signer's first, then those of its issuers."""
    c2pa_key: Path | None = None
    """PEM file of the private key of the first certificate, without a password."""

    def __post_init__(self) -> None:
        files = [file is not None for file in (self.c2pa_cert, self.c2pa_key)]
        if "c2pa" in self.kinds and not all(files):
            raise ValueError("--provenance c2pa signs files; give --c2pa-cert and --c2pa-key")
        if "c2pa" not in self.kinds and any(files):
            raise ValueError("--c2pa-cert and --c2pa-key are about --provenance c2pa, which is missing")


class Provenance:
    """Marks pixels and signs files. All methods may be called from any thread."""

    def __init__(self, config: ProvenanceConfig = ProvenanceConfig()) -> None:
        """
        Raises:
            ValueError: a package is missing, or the certificates and the key cannot sign; the message has the remedy.
        """
        self._has_watermark = "watermark" in config.kinds
        self._signer: Signer | None = None
        if self._has_watermark:
            open_encoder()
        if config.c2pa_cert is not None and config.c2pa_key is not None:
            self._signer = Signer(config.c2pa_cert, config.c2pa_key)

    def watermark_of(self, width: int, height: int) -> Watermark | None:
        """Return the watermark that pictures of a size, in pixels, get; None if they get none."""
        return watermark_of(width, height) if self._has_watermark else None

    def marked(self, pixels: Pixels) -> Pixels:
        """Return pixels as they are delivered, uint8 [H, W, 3] or [F, H, W, 3]: with the watermark, if it is on."""
        height, width = pixels.shape[-3:-1]
        return pixels if self.watermark_of(width, height) is None else with_watermark(pixels)

    def signed(self, content: bytes, file_format: str, params: SamplingParams, receipt: Receipt | None = None) -> bytes:
        """Return a file with a manifest, if manifests are on and the format holds one.

        Args:
            content: file of a picture or clip, whose pixels are `marked`.
            file_format: such as "png".
            params: of the picture or clip.
            receipt: becomes a part of the manifest.
        """
        if self._signer is None or file_format not in MIME_TYPES:
            return content
        is_marked = self.watermark_of(params.width, params.height) is not None
        return self._signer.sign(
            content,
            MIME_TYPES[file_format],
            _manifest(params.edit is not None, is_marked, receipt, len(params.references)),
        )

    def warnings(self, width: int, height: int, file_format: str) -> list[str]:
        """Return what a file of a size, in pixels, and of a format lacks."""
        lacking = []
        if self._has_watermark and self.watermark_of(width, height) is None:
            lacking.append(f"pictures of less than {MIN_PIXELS} pixels, such as {width}x{height}, have no watermark")
        if self._signer is not None and file_format not in MIME_TYPES:
            lacking.append(f"{file_format} files have no C2PA manifest; {', '.join(MIME_TYPES)} have one")
        return lacking


def _manifest(
    is_edit: bool = False, is_marked: bool = False, receipt: Receipt | None = None, num_references: int = 0
) -> dict[str, Any]:
    """Return a manifest as the C2PA library defines it in JSON."""
    agent = {"name": "tdm-serve", "version": package_version()}
    manifest: dict[str, Any] = {"claim_generator_info": [agent]}
    if is_edit:
        manifest["ingredients"] = [{"title": "given picture", "relationship": "parentOf", "label": "given"}]
        actions: list[dict[str, Any]] = [
            {"action": "c2pa.opened", "parameters": {"ingredientIds": ["given"]}},
            {
                "action": "c2pa.edited",
                "digitalSourceType": f"{SOURCE_TYPE}compositeWithTrainedAlgorithmicMedia",
                "softwareAgent": agent,
            },
        ]
    else:
        source = f"{SOURCE_TYPE}trainedAlgorithmicMedia"
        actions = [{"action": "c2pa.created", "digitalSourceType": source, "softwareAgent": agent}]
        if labels := [f"reference {n}" for n in range(1, num_references + 1)]:
            manifest["ingredients"] = [{"title": name, "relationship": "inputTo", "label": name} for name in labels]
            actions[0]["parameters"] = {"ingredientIds": labels}
    if is_marked:
        actions.append({"action": "c2pa.watermarked.unbound", "softwareAgent": agent})
    manifest["assertions"] = [{"label": "c2pa.actions.v2", "data": {"actions": actions}}]
    if receipt is not None:
        manifest["assertions"].append({"label": RECEIPT_LABEL, "data": {"receipt": receipt.to_json()}})
    return manifest


class Signer:
    """Signs files with one certificate. No timestamp authority is asked, so signing needs no network."""

    def __init__(self, cert: Path, key: Path) -> None:
        """
        Args:
            cert, key: see `ProvenanceConfig`.

        Raises:
            ValueError: c2pa-python is not installed, a file cannot be read, or the two cannot sign.
        """
        try:
            import c2pa
        except ImportError as error:
            raise ValueError(f"--provenance c2pa needs a package ({error}); {REMEDY}") from error
        chain, private_key = _read(cert, "--c2pa-cert"), _read(key, "--c2pa-key")
        algorithm = _algorithm(chain, private_key, cert, key)
        try:
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, private_key, None))
            self._context = c2pa.Context(c2pa.Settings.from_dict(SETTINGS))
            stream = io.BytesIO()
            Image.new("RGB", (8, 8)).save(stream, "PNG")
            trial = self.sign(stream.getvalue(), MIME_TYPES["png"], _manifest())
            with c2pa.Reader(MIME_TYPES["png"], io.BytesIO(trial)) as reader:
                results = reader.get_validation_results() or {}
                if reader.get_validation_state() == "Invalid":
                    failures = results["activeManifest"]["failure"]
                    raise ValueError(", ".join(failure.get("explanation", failure["code"]) for failure in failures))
        except (c2pa.C2paError, ValueError) as error:
            message = "give the certificate of a signer, with the extended key usage that C2PA asks for"
            raise ValueError(f"--c2pa-cert {cert} cannot sign: {error}; {message}") from error

    def sign(self, content: bytes, mime_type: str, manifest: Mapping[str, Any]) -> bytes:
        """Return the file with a signed manifest.

        Raises:
            c2pa.C2paError: the file is none of `mime_type`, or is damaged.
        """
        import c2pa

        signed = io.BytesIO()
        with c2pa.Builder(manifest, self._context) as builder:
            builder.sign(self._signer, mime_type, io.BytesIO(content), signed)
        return signed.getvalue()


def _read(file: Path, argument: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{argument} {file} cannot be read: {error.strerror}") from None


def _algorithm(chain: bytes, private_key: bytes, cert: Path, key: Path) -> str:
    """Return the signature algorithm of a key, in the C2PA library's names.

    Raises:
        ValueError: a file is not PEM, or the key is of no known kind or of another certificate.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificates

    try:
        signer, *_ = load_pem_x509_certificates(chain)
    except ValueError:
        raise ValueError(f"--c2pa-cert {cert} holds no certificates in PEM") from None
    try:
        private = load_pem_private_key(private_key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"--c2pa-key {key} holds no private key in PEM without a password") from None
    if private.public_key() != signer.public_key():
        raise ValueError(f"--c2pa-key {key} is not the key of the first certificate in {cert}")
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in CURVES:
        return CURVES[private.curve.name]
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise ValueError(f"--c2pa-key {key} is of no kind that C2PA signs with; take P-256, P-384, P-521, RSA or Ed25519")
