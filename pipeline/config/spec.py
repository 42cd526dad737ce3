"""The base of the specs, which hold the options of one stage each.

A spec defines a job's command line, the layout of a YAML file, and a fingerprint. Fields that change the result enter
the fingerprint. ``unhashed`` fields do not: they only say where, how fast and how much work is done. Inputs enter a
fingerprint by their content, not by their path (``Spec.fingerprint``). If the default of a hashed field changes, the
old default must stay its neutral value (``kac.util.fingerprint``).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

from pydantic import model_validator

from kac.precision import Precision
from kac.util.errors import has_secret
from kac.util.fingerprint import fingerprint, hashed_values
from kac.util.options import Options, flatten
from kac.util.path_options import check_apart


class Spec(Options):
    """The options of a stage."""

    stage: ClassVar[str]
    is_probed: ClassVar[bool] = True
    """Whether a job checks, before the stage starts, that S3 answers for the paths of this spec."""
    common: ClassVar[tuple[str, ...]] = ()
    """Fields that ``--help`` lists first, after the required ones."""

    @model_validator(mode="after")
    def _check_no_secret(self) -> Self:
        """Specs are written into outputs and into MLflow."""
        for name, value in flatten(self.model_dump(mode="json")).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and has_secret(text):
                    raise ValueError(
                        f"`{name}` contains a password or key. Set the AWS_* variables, or use the role of the nodes."
                    )
        return self

    @model_validator(mode="after")
    def _check_apart(self) -> Self:
        check_apart(self)
        return self

    def fingerprint(self, **content: Any) -> str:
        """Return the fingerprint of the output of this spec.

        Args:
            content: hashes of the inputs.
        """
        precision = getattr(self, "precision", None)
        assert precision is None or precision.dtype != "auto", "call settled() before fingerprint()"
        return fingerprint({"stage": self.stage, **hashed_values(self), **content})

    def settled(self, on_gpu: Callable[[], bool]) -> Self:
        """Return the spec with ``precision.dtype`` auto replaced by a type. Stages call this first.

        Args:
            on_gpu: returns whether the work runs on GPUs. Called only for auto, because it may start Ray.
        """
        precision: Precision = self.precision  # type: ignore[attr-defined]
        if precision.dtype != "auto":
            return self
        return self.model_copy(update={"precision": precision.settled(on_gpu())})
