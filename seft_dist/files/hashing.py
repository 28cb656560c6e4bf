"""SHA-256 of open files."""

import hashlib
from typing import BinaryIO

_CHUNK_BYTES = 1 << 18


def sha256_of(file: BinaryIO) -> "hashlib._Hash":
    """Hash what an open file holds, from where it stands to its end (``hashlib.file_digest`` needs Python 3.11).

    Args:
        file: Opened in binary mode.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:size])
    return digest
