"""The examples in the docstrings of the public API run and give the output shown."""

import doctest
import importlib
import subprocess
import sys

import pytest

import kac

EXEMPT = {"Model", "ModelConfig", "load_config", "load_model"}
"""These functions need model folders, so tests/pipeline/test_api.py tests them instead."""


@pytest.mark.parametrize(
    "module",
    [
        *("process", "path", "solvers", "guidance", "metrics.distances", "metrics.statistics"),
        *("losses.objectives", "losses.flow_matching", "losses.refinement"),
    ],
)
def test_examples(module: str):
    result = doctest.testmod(importlib.import_module(f"kac.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(kac.__all__) - EXEMPT))
def test_every_public_name_has_an_example(name: str):
    assert ">>> " in (getattr(kac, name).__doc__ or "")


def test_the_library_is_silent_and_sets_the_wait_policy_of_openmp():
    code = "import os, kac; from kac.util.log import log; log.info('hidden'); print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("PASSIVE\n", "")
