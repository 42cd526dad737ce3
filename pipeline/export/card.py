"""The model card of an export: README.md with the Hugging Face Hub's front matter."""

from typing import Any

import yaml

from kac.conditioning import known_classes
from kac.data.class_names import list_classes
from kac.model import ModelConfig
from kac.sampling import TEACHER_STEPS
from kac.util import files
from kac.util.errors import ArgumentError
from kac.util.options import flatten
from pipeline import outputs
from pipeline.config import ExportSpec
from pipeline.evaluate.scores import EVALUATION_FILE, REAL, cells, provenance, read_record

LIBRARIES = {"diffusers": "diffusers", "pt2": "pytorch", "onnx": "onnx"}

PIPELINE = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)  # FOLDER: this folder or repository
images = pipeline({labels}, num_inference_steps={steps}, generator=torch.Generator().manual_seed(0)).images
```

Needs diffusers 0.42 or newer. The pipeline's code is in `pipeline.py`; `trust_remote_code` allows it. `class_labels` are
numbers or names. `guidance` is w in u + w (u − u_weaker); 0 means none. A generator gives the noise of its seed, and its
next call continues with the next images. Images are rounded to 8 bits. `output_type="pt"` returns them in [-1, 1],
[n, channels, height, width]; `"np"` in [0, 1], [n, height, width, channels]; `"pil"` as pictures."""

PROGRAM = """```python
import numpy as np
from noise import initial_noise  # noise.py in this folder

x = initial_noise({path}, seed=0, count=4, sample_shape={shape}).numpy()
inputs = {{"x": x, "t": np.ones(4, np.float32), "label": np.zeros(4, np.int64){conditions}}}
{call}
x = x - (1 - 0) * u  # an Euler step from t = 1 (noise) to t = 0 (data)
```

| input | shape | type |
|---|---|---|
{rows}

The output is the velocity u, [batch, {size}], float32. The batch size is free. The null label ("no class") is {null}."""

CALLS = {
    "pt2": "import torch\n\nvelocity = torch.export.load('network.pt2').module()\n"
    "u = velocity(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()",
    "onnx": "import onnxruntime\n\n(u,) = onnxruntime.InferenceSession('network.onnx').run(None, inputs)",
}


def card(spec: ExportSpec, config: ModelConfig, parameters: int) -> str:
    """Return the text of the card."""
    front = {
        "library_name": LIBRARIES[spec.format],
        "license": spec.license,
        "tags": ["distillkac", "flow-matching", "kac-flow" if config.path.kind == "kac" else "gaussian-path"],
        **({"pipeline_tag": "unconditional-image-generation"} if len(config.sample_shape) == 3 else {}),
    }
    sampler = f"AB-2, {TEACHER_STEPS} steps" if config.kind == "teacher" else f"Euler, {config.steps} steps"
    facts = {
        "kind": config.kind,
        "default sampler": f"{sampler} (any number is possible)" if config.is_any_step else sampler,
        "guidance": config.guidance_scales or config.guidance,
        "path": config.path,
        "network": f"{config.network.kind}, {parameters:,} parameters",
        "samples": list(config.sample_shape),
        "data": f"{config.data.kind}, sha256 {config.data_sha256}",
        "classes": list_classes(config.class_names) or f"{config.num_classes}, unnamed",
        "weights sha256": config.weights_sha256,
        "teacher's weights sha256": config.teacher_sha256,
        "store": config.store_fingerprint,
        "refined in": ", ".join(config.refined_in),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value not in (None, ""))
    recorded = outputs.read_json(files.join(spec.model, outputs.SPEC_FILE)) or {}
    options = yaml.safe_dump(flatten(recorded.get("identity", {})), sort_keys=False)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {spec.out.rsplit('/', 1)[-1]}",
        f"A {config.kind} of [DistillKac](https://arxiv.org/abs/2509.21513), a flow from noise (t = 1) to data (t = 0).",
        *(["![samples](samples.png)"] if spec.samples else []),
        "## Use\n\n" + (PIPELINE if spec.format == "diffusers" else PROGRAM).format(**_values(spec, config)),
        f"## Model\n\n| | |\n|---|---|\n{table}",
        *([f"## Training\n\n```yaml\n{options}```"] if recorded else []),
        *([f"## Evaluation\n\n{evaluation_table(spec, config)}"] if spec.evaluation else []),
    ]
    return "\n\n".join(parts) + "\n"


def _values(spec: ExportSpec, config: ModelConfig) -> dict[str, Any]:
    shape, takes = config.sample_shape, config.network.conditions
    size = ", ".join(map(str, shape))
    shapes = {"x": f"[batch, {size}]", **dict.fromkeys(("t", "label", *takes), "[batch]")}
    return {
        "labels": f"class_labels={[*known_classes(config)[:2]]}" if known_classes(config) else "batch_size=2",
        "steps": config.steps or TEACHER_STEPS,
        "path": config.path.model_dump(),
        "shape": shape,
        "conditions": "".join(f', "{name}": np.zeros(4, np.float32)' for name in takes),
        "call": CALLS.get(spec.format),
        "rows": "\n".join(f"| {n} | {s} | {'int64' if n == 'label' else 'float32'} |" for n, s in shapes.items()),
        "size": size,
        "null": config.num_classes,
    }


def evaluation_table(spec: ExportSpec, config: ModelConfig) -> str:
    """Return the rows of real images and of this model in an evaluation, with counts and judges, as Markdown.

    Raises:
        ArgumentError: the folder has no finished evaluation, or the evaluation has no scores of the model.
    """
    try:
        record = read_record(str(spec.evaluation))
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"`evaluation` {spec.evaluation} has no {EVALUATION_FILE}. Finish it first.") from None
    own = [score for score in record.scores if (score.kind, score.fingerprint) == (config.kind, config.fingerprint)]
    if not own:
        raise ArgumentError(f"`evaluation` {spec.evaluation} has no scores of {spec.model}. Evaluate this model first.")
    record = record.model_copy(update={"scores": (*(s for s in record.scores if s.kind == REAL), *own)})
    headings, rows = cells(record)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + "\n\n".join(provenance(record))
