"""A cache for results that can be recomputed: decoded data sets, classifiers, reference statistics, samples."""

import os
from pathlib import Path

from kac.util import files

VARIABLE = "DISTILLKAC_CACHE"


def cache_folder(*names: str) -> str:
    """Return a folder in the cache. The cache is at ``$DISTILLKAC_CACHE`` (default: ``~/.cache/distillkac``).

    A cached file's name identifies its inputs, so the file never goes stale. You can delete it at any time.
    """
    folder = files.normal(os.environ.get(VARIABLE) or str(Path.home() / ".cache" / "distillkac"))
    for name in names:
        folder = files.join(folder, name)
    return folder
