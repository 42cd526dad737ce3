"""Export a model folder to a format that other software loads without this project.

OUT/README.md, samples.png   the model card and its picture
OUT/...                      the files of the format (``formats``)
OUT/export.json              written last
"""

import hashlib
import importlib.util
import json
import tempfile
from pathlib import Path

from kac.model import ModelConfig, load_config, load_model
from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError, one_line
from kac.util.log import log
from pipeline import claims, outputs
from pipeline.cluster import connection as cluster
from pipeline.config import ExportSpec
from pipeline.export.formats import KINDS, write_pipeline, write_programs
from pipeline.export.model_card import card, scores
from pipeline.report.pictures import sheet

RECORD_FILE = "export.json"
OWN_FILES = [RECORD_FILE, outputs.SPEC_FILE, claims.CLAIM_FILE]  # not uploaded


def export(spec: ExportSpec) -> None:
    """Write a model in another format, and upload it if ``spec.push_to_hub`` is set. A complete folder stays unchanged.

    Raises:
        DistillKacError: the model does not exist or cannot be exported, a package or the Hub's token is missing, the
            output folder has other content, or the upload fails.
    """
    spec = cluster.absolute_paths(spec, "model", "out", "evaluation")
    config = load_config(spec.model)
    table = scores(spec, config) if spec.evaluation else ""
    _check(spec, config)
    content = {"weights_sha256": config.weights_sha256}
    if table:
        content["scores_sha256"] = hashlib.sha256(table.encode()).hexdigest()
    if outputs.begin(spec.out, spec, RECORD_FILE, **content):
        try:
            _write(spec, config, table)
            record = {"fingerprint": spec.fingerprint(**content), "format": spec.format, **content}
            files.write_bytes(files.join(spec.out, RECORD_FILE), json.dumps(record, indent=2).encode())
        finally:
            claims.release(spec.out)
        log.info(f"export: wrote {spec.out}: {spec.format}")
    else:
        log.info(f"export: {spec.out} is complete: nothing to do")
    if spec.push_to_hub:
        _push(spec.out, spec.push_to_hub)


def _check(spec: ExportSpec, config: ModelConfig) -> None:
    if config.network.kind not in KINDS:
        raise ArgumentError(
            f"`model` {spec.model} has a network of kind {config.network.kind}, whose code is not part of this "
            f"project. Only the kinds {', '.join(KINDS)} can be exported."
        )
    if spec.format == "onnx" and None in map(importlib.util.find_spec, ("onnx", "onnxscript")):
        raise ArgumentError("`format` onnx needs more packages. Install them: pip install 'distillkac[onnx]'.")
    if spec.push_to_hub:
        from huggingface_hub import get_token

        if files.is_uri(spec.out):
            raise ArgumentError(f"`push_to_hub` needs a local folder, but `out` is {spec.out}.")
        if get_token() is None:
            raise ArgumentError("`push_to_hub` needs a Hugging Face token. Set HF_TOKEN, or run `hf auth login`.")
    names = {*files.list_sizes(spec.out)}
    if names and names.isdisjoint(OWN_FILES):
        raise ArgumentError(f"`out` {spec.out} is not empty and is not an export. Choose another folder.")


def _write(spec: ExportSpec, config: ModelConfig, table: str) -> None:
    model = load_model(spec.model)  # on the CPU, where programs are traced
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if spec.format == "diffusers":
            write_pipeline(folder, model)
        else:
            write_programs(folder, model, spec.format)
        if spec.samples:
            images = model.sample(spec.samples).images.numpy()
            (folder / "samples.png").write_bytes(sheet(images, columns=8))
        (folder / "README.md").write_text(card(spec, config, table))
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            files.write_bytes(files.join(spec.out, path.relative_to(folder).as_posix()), path.read_bytes())


def _push(out: str, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=out, ignore_patterns=OWN_FILES)
    except Exception as error:  # the errors of the Hub's HTTP client differ between versions
        raise DistillKacError(f"The upload of {out} to {repository} failed ({one_line(error)}). Try again.") from error
    log.info(f"export: uploaded {out} to https://huggingface.co/{repository}")
