"""The stages on Ray, the endpoint store, and tracking."""

import sys

if "ray" in sys.modules:
    from kac.util.log import show
    from pipeline.cluster.connection import is_worker

    if is_worker():  # Ray sends the output of its workers to the driver
        show()
