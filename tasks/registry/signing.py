"""Ed25519 keys and signatures of what is shipped (RFC 8032, by the `cryptography` package).

A private key is a PEM file that only its owner can read, and lies in no git repository; the public one is beside it.
There is no password: where the key file isn't safe, it belongs into a key store, and signing with it.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tasks.algorithms.errors import InputError

CONTEXT = b"edgepress-update-v1\0"
"""Signed with every text, so that the signature is good for nothing else."""
LIMIT = 2**16
"""Bytes of a key file, at most."""


def generate(path: Path) -> Path:
    """Write a private key, readable by its owner alone, and its public key; returns the latter's path.

    Raises:
        InputError: a file is there already, the folder isn't, or it is in a git repository.
    """
    public = path.with_name(f"{path.name}.pub")
    inside = next((parent for parent in path.resolve().parents if (parent / ".git").exists()), None)
    if inside:
        raise InputError(f"{path} is in the git repository {inside}: a private key belongs outside of it")
    if public.exists():
        raise InputError(f"{public} is there already: choose another name")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
    except FileExistsError as error:
        raise InputError(f"{path} is there already: choose another name") from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return public


def sign(text: bytes, key: Path) -> str:
    """The signature of a text, base64.

    Raises:
        InputError: the file is no private Ed25519 key, or others can read it.
    """
    content = _read(key)
    if key.stat().st_mode & 0o077:
        raise InputError(f"{key} can be read by others: `chmod 600 {key}`, or make a new key")
    try:
        private = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{key} is no private key: `keygen` makes one") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise InputError(f"{key} is no Ed25519 key: `keygen` makes one")
    return base64.b64encode(private.sign(CONTEXT + text)).decode()


def verify(text: bytes, signature: str, key: Path) -> bool:
    """Whether the signature of a text is that key's.

    Raises:
        InputError: the file is no public Ed25519 key.
    """
    try:
        public = serialization.load_pem_public_key(_read(key))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{key} is no public key: it is the .pub file that `keygen` makes") from error
    if not isinstance(public, Ed25519PublicKey):
        raise InputError(f"{key} is no Ed25519 key: it is the .pub file that `keygen` makes")
    try:
        public.verify(base64.b64decode(signature, validate=True), CONTEXT + text)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LIMIT)
    except OSError as error:
        raise InputError(f"cannot read the key {path}: {error.strerror}") from error
