"""`python -m jobs.store --help`"""

from functools import partial

from jobs.command import main_of
from pipeline.store import describe, merge, verify

main = partial(
    main_of,
    {
        "describe": (describe.DescribeSpec, describe.run),
        "verify": (verify.VerifySpec, verify.run),
        "merge": (merge.MergeSpec, merge.merge),
    },
    "python -m jobs.store",
    "Look after endpoint stores: say what one is, check every byte of it, join several.",
)

if __name__ == "__main__":
    main()
