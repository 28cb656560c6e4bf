"""SHA-256 of open files."""

import hashlib
from typing import BinaryIO

_CHUNK_BYTES = 1 << 18


def sha256_of(file: BinaryIO) -> "hashlib._Hash":
    """Compute the SHA-256 of an open file, from its current position to its end.

    It replaces ``hashlib.file_digest``, which needs Python 3.11.

    Args:
        file: Opened in binary mode.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:size])
    return digest
