"""The cache of results that can be recomputed: decoded data sets, classifiers, reference statistics, samples."""

import os
from pathlib import Path

from kac.util import files

VARIABLE = "DISTILLKAC_CACHE"


def cache_folder(*names: str) -> str:
    """Return a folder in the cache: ``DISTILLKAC_CACHE`` (a path or s3:// URI), by default ``~/.cache/distillkac``.

    The name of a cached file identifies its inputs, so the file never goes stale. It can be deleted at any time.
    """
    folder = files.normal(os.environ.get(VARIABLE) or str(Path.home() / ".cache" / "distillkac"))
    for name in names:
        folder = files.join(folder, name)
    return folder
