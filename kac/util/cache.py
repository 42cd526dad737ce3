"""The cache of results that can be recomputed: decoded data sets, classifiers, reference statistics, samples."""

import os
from pathlib import Path

from kac.util import files

VARIABLE = "DISTILLKAC_CACHE"


def cache_folder(*names: str) -> str:
    """Return a folder in the cache, which is at ``DISTILLKAC_CACHE`` (a path or s3:// URI) or ``~/.cache/distillkac``.

    Cached files are named by what they were computed from, so they never go stale and can be deleted at any time.
    """
    folder = files.normal(os.environ.get(VARIABLE) or str(Path.home() / ".cache" / "distillkac"))
    for name in names:
        folder = files.join(folder, name)
    return folder
