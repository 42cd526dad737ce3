"""The commands of jobs/README.md that distill a public model of diffusers, with random weights and small sizes."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest

from kac.model import load_model
from tests.jobs.test_recipes import ONE_SHARD, root_of
from tests.kac.diffusers_folders import unet, write

SMALL = {
    "convert": "",
    "rollout": f"{ONE_SHARD} --trajectories 8",
    "distill": "--objective flow-map --objective.grids 1 2 4 --optimizer.updates 2 --optimizer.batch-size 4 "
    "--workers 0 --precision.dtype float32",
    "evaluate": "--samples 8 --steps 1 2 --solver-steps 4 --features pixels --actors 0 --precision.dtype float32",
    "export": "--samples 4",
}
"""Options that make each command small."""

ALONE = """
import sys
import numpy as np
sys.modules.update(kac=None, pipeline=None, jobs=None)
import diffusers, torch
pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
for steps in (1, 2, 4):
    generator = torch.Generator().manual_seed(3)
    images = pipeline(batch_size=3, num_inference_steps=steps, generator=generator, output_type="pt").images
    np.save(f"{steps}.npy", images.numpy())
"""


def test_the_readmes_commands_distill_a_public_model(
    project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = (project_root / "jobs/README.md").read_text()
    section = text.partition("For a public model:")[2].partition("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    sizes = {"sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8)}
    write(tmp_path / "ddpm", unet(**sizes), diffusers.DDPMScheduler())
    root_of("ddpm-cifar10", tmp_path)  # writes cifar-10-python.tar.gz
    commands = re.findall(r"^python -m jobs\.(\w+) +(.*)$", section, re.MULTILINE)
    assert [job for job, _ in commands] == list(SMALL)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for job, options in commands:
            monkeypatch.setattr(sys, "argv", [job, *shlex.split(f"{options} {SMALL[job]}")])
            runpy.run_module(f"jobs.{job}", run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handler)  # jobs set their own
    assert "FD pixels" in (tmp_path / "student-for-diffusers/README.md").read_text()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", ALONE, "student-for-diffusers"],
        env={**environment, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    student = load_model("runs/student")
    for steps in (1, 2, 4):
        np.testing.assert_allclose(np.load(f"{steps}.npy"), student.sample(3, steps=steps, seed=3).images, atol=1e-5)
