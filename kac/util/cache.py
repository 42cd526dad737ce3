"""Where things are kept that can be made again: decoded datasets, classifiers, reference statistics, drawn samples."""

import os
from pathlib import Path

from kac.util import files

VARIABLE = "DISTILLKAC_CACHE"


def cache_folder(*names: str) -> str:
    """A folder of the cache: below ``DISTILLKAC_CACHE``, a path or s3:// URI; default: ``~/.cache/distillkac``.

    What lies there is named by its content, so that it can be removed at any time and is never wrong.
    """
    folder = files.normal(os.environ.get(VARIABLE) or str(Path.home() / ".cache" / "distillkac"))
    for name in names:
        folder = files.join(folder, name)
    return folder
