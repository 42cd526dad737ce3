"""The model card of an export: README.md with the Hugging Face Hub's front matter."""

import yaml

from kac.conditioning import known_classes
from kac.model import ModelConfig
from kac.sampling import TEACHER_STEPS
from kac.util import files
from kac.util.errors import ArgumentError
from kac.util.options import flatten
from pipeline import outputs
from pipeline.config import ExportSpec
from pipeline.evaluate.scores import DECODED, REAL, cells, provenance, read_record

PIPELINE = """```python
import torch
from diffusers import DiffusionPipeline  # 0.42 or newer

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)  # this folder, or its name on the Hub
images = pipeline({labels}, num_inference_steps={steps}, generator=torch.Generator().manual_seed(0)).images
```

- `trust_remote_code` allows the code in `pipeline.py`, which documents all arguments.
- `class_labels` are numbers or names. `guidance` is the guidance scale; 0 means no guidance.
- A generator's next call continues with the next images of its seed.
- Images are clipped and rounded to 8 bits. `output_type` is `pil`, `np` ([0, 1], channels last) or `pt` ([-1, 1])."""

PROGRAM = """```python
import numpy as np
from noise import initial_noise  # noise.py in this folder

x = initial_noise({path}, seed=0, count=4, sample_shape={shape}).numpy()
inputs = {{"x": x, "t": np.ones(4, np.float32), "label": np.full(4, {label}){conditions}}}
{call}
x = x - u  # one Euler step, from t = 1 (noise) to t = 0 (data)
```

Inputs: `x` [batch, *{shape}] float32; `label` [batch] int64, {labels}; {others} [batch] float32. Output: the
velocity u, like `x`. The batch size is free."""

CALLS = {
    "pt2": "import torch\n\nprogram = torch.export.load('network.pt2').module()\n"
    "u = program(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()",
    "onnx": "import onnxruntime\n\n(u,) = onnxruntime.InferenceSession('network.onnx').run(None, inputs)",
}


def card(spec: ExportSpec, config: ModelConfig, table: str) -> str:
    """Return the text of the card. ``table`` has the scores, or is empty."""
    classes, takes = known_classes(config), config.network.conditions
    front = {
        "library_name": {"diffusers": "diffusers", "pt2": "pytorch", "onnx": "onnx"}[spec.format],
        "license": spec.license,
        "tags": ["distillkac", "flow-matching", f"{config.path.kind}-path", config.kind],
        **({"pipeline_tag": "unconditional-image-generation"} if len(config.sample_shape) == 3 else {}),
    }
    null = f'{config.num_classes}: "no class"' if config.conditioning != "classes" else ""
    accepted = ", ".join(filter(None, (f"0 to {config.num_classes - 1}: a class" if classes else "", null)))
    use = (PROGRAM if spec.format in CALLS else PIPELINE).format(
        label=classes[0] if classes else config.num_classes,
        labels=accepted if spec.format in CALLS else f"class_labels={[*classes[:2]]}" if classes else "batch_size=2",
        steps=config.steps or TEACHER_STEPS,
        path=config.path.model_dump(),
        shape=config.sample_shape,
        conditions="".join(f', "{name}": np.zeros(4, np.float32)' for name in takes),
        call=CALLS.get(spec.format),
        others=", ".join(f"`{name}`" for name in ("t", *takes)),
    )
    facts = config.model_dump(
        mode="json", exclude={"class_frequencies": True, "data": {"root", "autoencoder"}}, exclude_none=True
    )
    trained = (outputs.read_json(files.join(spec.model, outputs.SPEC_FILE)) or {}).get("identity")
    about = "an any-step student" if config.is_any_step else f"a {config.kind}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {spec.out.rsplit('/', 1)[-1]}",
        f"This is {about} of [DistillKac](https://arxiv.org/abs/2509.21513). Path from noise to data: {config.path}.",
        *(["![samples](samples.png)"] if spec.samples else []),
        f"## Use\n\n{use}",
        *([f"## Evaluation\n\n{table}"] if table else []),
        f"## Model\n\n```yaml\n{yaml.safe_dump(flatten(facts))}```",
        *([f"## Training\n\n```yaml\n{yaml.safe_dump(flatten(trained))}```"] if trained else []),
    ]
    return "\n\n".join(parts) + "\n"


def scores(spec: ExportSpec, config: ModelConfig) -> str:
    """Return the rows of real images and of this model in an evaluation, as Markdown.

    Raises:
        ArgumentError: the evaluation has no scores of the model.
    """
    record = read_record(str(spec.evaluation))
    own = [score for score in record.scores if (score.kind, score.fingerprint) == (config.kind, config.fingerprint)]
    if not own:
        raise ArgumentError(f"`evaluation` {spec.evaluation} has no scores of {spec.model}. Evaluate this model first.")
    record = record.model_copy(update={"scores": (*(s for s in record.scores if s.kind in {REAL, DECODED}), *own)})
    headings, rows = cells(record)
    lines = [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rows)]
    return "\n".join([*lines, "", *(f"- {line}" for line in provenance(record))])
