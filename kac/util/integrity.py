"""Verify the checksums of compressed files before their content is used."""

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable

from kac.util.errors import DistillKacError, one_line

BLOCK, HEAD = 2**20, 64
"""Bytes to decompress per step, and bytes to decompress first in order to find the content's size."""


def gunzip(path: str, packed: bytes, size_of: Callable[[bytes], int], advice: str = "Download it again.") -> bytes:
    """Decompress a gzip file and verify its checksum.

    Args:
        path: the file's path, for error messages.
        size_of: returns the content's largest valid size in bytes, given its first bytes. It may raise an error.
        advice: the sentence that ends error messages and says what to do.

    Raises:
        DistillKacError: the file is not in gzip format, is damaged or truncated, or is larger than its valid size.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = bytearray(file.read(HEAD))
            most = size_of(bytes(content))
            while block := file.read(BLOCK):
                content += block
                if len(content) > most:
                    raise DistillKacError(f"{path} decompresses to more than the expected {most:,} bytes. {advice}")
    except (OSError, EOFError, zlib.error) as error:
        reason = one_line(error).rstrip(".")
        raise DistillKacError(f"{path} is not a complete gzip file ({reason}). {advice}") from None
    return bytes(content)


def check_zip(data: bytes) -> None:
    """Verify all checksums in a zip archive. PyTorch saves zip archives, but does not verify their checksums.

    Other formats, and archives without checksums, are not checked.

    Raises:
        ValueError: the archive is damaged.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            has_checksums = any(entry.CRC for entry in archive.infolist())  # torch.save can omit checksums
            if has_checksums and (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    except (OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"the file is damaged ({one_line(error, 120)})") from None
