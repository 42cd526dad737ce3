"""Fake sweeps without training: the trials of a ledger, and an evaluation of their students."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from pipeline.evaluate.scores import Record, Score
from pipeline.sweep import TrialRecord

TEACHER = {0.0: (0.21, 5.6), 0.5: (0.24, 4.7), 1.0: (0.33, 4.3), 2.0: (0.61, 5.1)}
"""Frechet distances of a teacher in pixels and in the classifier's features, per guidance scale."""


def trial_record(number: int, name: str, out: str, values: dict[str, Any], **options: Any) -> TrialRecord:
    """Return the record of a trial, finished by default."""
    defaults = {"status": "finished", "updates": 2000, "seconds": 31.0}
    return TrialRecord(**{**defaults, **options}, number=number, name=name, out=out, values=values)


def grid(
    out: Path, steps: Sequence[int] = (1, 2, 4, 20), scales: Sequence[float] = (0.0, 0.5, 1.0, 2.0)
) -> list[TrialRecord]:
    """Return one trial per step count and guidance scale."""
    trials = []
    for m in steps:
        for w in scales:
            name = f"steps-{m}-guidance-{w}"
            metrics = {
                "loss": 0.03 / m,
                "validation/energy_distance": 0.4 / m + 0.01 * w,
                "validation/endpoint_error": 0.1,
            }
            trials.append(
                trial_record(len(trials), name, str(out / name), {"steps": m, "guidance": w}, metrics=metrics)
            )
    return trials


def search(out: Path, count: int = 32) -> list[TrialRecord]:
    """Return the trials of a random search over four fields, one of them text. Two of three trials finish."""
    draws, trials = np.random.default_rng(0), []
    for number in range(count):
        rate = float(10 ** draws.uniform(-4, -2.5))
        values = {
            "optimizer.learning_rate": rate,
            "optimizer.batch_size": int(draws.choice([64, 128, 256, 512])),
            "objective.kind": str(draws.choice(["endpoint", "flow-map"])),
            "guidance": round(float(draws.uniform(0, 2)), 3),
        }
        error = (np.log10(rate) + 3.0) ** 2 + (0.3 if values["objective.kind"] == "endpoint" else 0.0)
        metrics = {
            "loss": 0.02 + 0.01 * error,
            "validation/energy_distance": 0.05 + 0.1 * error + 0.01 * draws.random(),
        }
        status = "stopped" if number % 3 == 2 else "finished"
        name = f"trial-{number}"
        trials.append(trial_record(number, name, str(out / name), values, status=status, metrics=metrics))
    return trials


def evaluation(folder: Path, trials: Sequence[TrialRecord], shown: int = 12) -> str:
    """Write the folder of an evaluation of the trials' students. Their samples are digits with added noise."""
    folder.mkdir(parents=True)
    digits = load_digits().images[:, None] / 8 - 1
    draws = np.random.default_rng(1)
    scores, images = [_real_score()], [digits[:shown]]
    for w in sorted({float(trial.values["guidance"]) for trial in trials}):
        scores.append(_score(f"teacher w={w:g}", "teacher", 100, w, 1.0, "/runs/teacher", draws))
        images.append(digits[:shown])
    for trial in sorted(trials, key=lambda t: (float(t.values["guidance"]), -t.values.get("steps", 4))):
        m, w = trial.values.get("steps", 4), float(trial.values["guidance"])
        worse = 1 + 4 * m**-1.3 + 0.2 * draws.random()
        scores.append(_score(trial.name, "student", m, w, worse, trial.out, draws))
        images.append(np.clip(digits[:shown] + 0.15 * worse * draws.standard_normal((shown, 1, 8, 8)), -1, 1))
    record = Record(
        fingerprint="0123456789abcdef",
        samples=5000,
        seeds=(1_000_003,),
        features=("pixels", "classifier"),
        facts={"classifier": {"held_out_accuracy": 0.9831}},
        real={"kind": "digits", "train": 1442, "held_out": 355, "sha256": "1f" * 32},
        floor_count=355,
        kept_rows=10_000,
        scores=tuple(scores),
    )
    (folder / "evaluation.json").write_text(json.dumps(record.model_dump(mode="json")))
    (folder / "spec.json").write_text(json.dumps({"options": {"teacher": "/runs/teacher"}}))
    sink = io.BytesIO()
    np.savez_compressed(sink, **{str(row): samples.astype(np.float32) for row, samples in enumerate(images)})
    (folder / "samples.npz").write_bytes(sink.getvalue())
    return str(folder)


def _real_score() -> Score:
    metrics = {"frechet_distance_pixels": 0.52, "frechet_distance_classifier": 2.9, "precision_classifier": 0.79}
    metrics |= {"recall_classifier": 0.8, "label_agreement": 0.983, "memorisation": 1.0, "sliced_wasserstein": 0.0021}
    metrics |= {"kid_classifier_to_held_out": 0.1}
    metrics |= {f"{name}_at_floor_count": value for name, value in metrics.items() if name.startswith("frechet")}
    return Score(
        name="real images", kind="real", steps=None, guidance=None, count=355, metrics=metrics, fingerprint="1f" * 32
    )


def _score(name: str, kind: str, steps: int, w: float, worse: float, folder: str, draws: np.random.Generator) -> Score:
    nearest = min(TEACHER, key=lambda scale: abs(scale - w))
    pixels, classifier = TEACHER[nearest]
    metrics = {"frechet_distance_pixels": pixels * worse, "frechet_distance_classifier": classifier * worse}
    metrics |= {f"{key}_at_floor_count": 1.2 * value for key, value in metrics.items()}
    metrics |= {"precision_classifier": 0.8 / worse**0.2, "recall_classifier": 0.7 / worse**0.3}
    metrics |= {"label_agreement": 0.99 - 0.02 * worse, "sliced_wasserstein": 0.002 * worse, "memorisation": 1.02}
    metrics |= {"kid_classifier_to_held_out": 2 * worse}
    metrics |= {"nfe": float(steps), "images_per_second": 52_000 / steps * float(draws.uniform(0.95, 1.05))}
    if kind == "student":
        metrics |= {"frechet_ratio_pixels": worse, "frechet_ratio_classifier": worse, "endpoint_error": 0.05 * worse}
    return Score(
        name=name, kind=kind, steps=steps, guidance=w, count=5000, metrics=metrics, fingerprint="ab" * 32, folder=folder
    )
