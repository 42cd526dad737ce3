"""Checksums at the end of compressed files: a file is read to its end before anything in it is used."""

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable

from kac.util.errors import DistillKacError, one_line

BLOCK = 2**20
HEAD = 64
"""How much of a file is unpacked to learn how large it is."""


def gunzip(path: str, packed: bytes, size_of: Callable[[bytes], int], advice: str = "fetch it again") -> bytes:
    """The content of a gzip file, whose checksum has been verified.

    Args:
        path, advice: for messages.
        size_of: from the first bytes of the content, the largest size that it may have. May raise.

    Raises:
        DistillKacError: it is no gzip file, is damaged or cut short, or holds more than that.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = bytearray(file.read(HEAD))
            most = size_of(bytes(content))
            while block := file.read(BLOCK):
                content += block
                if len(content) > most:
                    raise DistillKacError(
                        f"{path}: the gzip file holds more than the expected {most:,} bytes: {advice}"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise DistillKacError(f"{path}: expected a whole gzip file, found: {one_line(error)}: {advice}") from None
    return bytes(content)


def check_zip(data: bytes) -> None:
    """Verify the checksum of every file in a zip archive, the format of PyTorch's files, since PyTorch does not.

    Other formats, and archives that were written without checksums, have none.

    Raises:
        ValueError: the archive is damaged.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            has_checksums = any(entry.CRC for entry in archive.infolist())  # torch.save can leave them out
            damaged = archive.testzip() if has_checksums else None
    except (OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"a damaged file ({one_line(error, 120)})") from None
    if damaged is not None:
        raise ValueError(f"a damaged file (the checksum of {damaged} is wrong)")
