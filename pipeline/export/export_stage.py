"""Export a model folder to a format that other software loads without this project.

OUT/README.md      the model card; samples.png is its picture
OUT/...            the files of ``diffusers_folder`` or of ``programs``
OUT/export.json    written last; marks the folder as complete
"""

import json
import tempfile
from pathlib import Path

from kac.model import ModelConfig, load_config, load_model, main_weights
from kac.util import files
from kac.util.device import default_device
from kac.util.errors import ArgumentError, DistillKacError, one_line
from kac.util.log import log
from pipeline import claims, outputs
from pipeline.cluster import connection as cluster
from pipeline.config import ExportSpec
from pipeline.export import diffusers_folder, programs
from pipeline.export.bundle import bundle
from pipeline.export.card import card, evaluation_table
from pipeline.report.pictures import sheet

RECORD_FILE = "export.json"
OWN_FILES = (RECORD_FILE, outputs.SPEC_FILE, claims.CLAIM_FILE)  # not uploaded


def export(spec: ExportSpec) -> None:
    """Write a model in another format, and upload it if ``spec.push_to_hub`` is set. A complete folder stays unchanged.

    Raises:
        DistillKacError: the model does not exist or cannot be exported, a package or the Hub's token is missing, the
            output folder has other content, or the upload fails.
    """
    spec = cluster.absolute_paths(spec, "model", "out", "evaluation")
    config = load_config(spec.model)
    if config.network.kind not in diffusers_folder.COMPONENTS:
        raise ArgumentError(
            f"`model` {spec.model} has a network of kind {config.network.kind}, whose code is not part of this "
            f"project, so it cannot be exported. Choose a model of kind {', '.join(diffusers_folder.COMPONENTS)}."
        )
    programs.check_packages(spec.format)
    if spec.evaluation:
        evaluation_table(spec, config)
    if spec.push_to_hub:
        _check_hub(spec)
    names = files.list_sizes(spec.out)
    if names and not {*OWN_FILES} & {*names}:
        raise DistillKacError(f"{spec.out} is not empty and is not an export. Choose another `out`.")
    content = {"weights_sha256": config.weights_sha256}
    if outputs.begin(spec.out, spec, RECORD_FILE, **content):
        try:
            _write(spec, config, spec.fingerprint(**content))
        finally:
            claims.release(spec.out)
    else:
        log.info(f"export: {spec.out} is complete: nothing to do")
    if spec.push_to_hub:
        _push(spec.out, spec.push_to_hub)


def _write(spec: ExportSpec, config: ModelConfig, fingerprint: str) -> None:
    model = load_model(spec.model)
    parameters = sum(weight.numel() for weight in main_weights(model.network).values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if spec.format == "diffusers":
            diffusers_folder.write_pipeline(folder, model)
        else:
            programs.write_programs(folder, model, spec.format)
            (folder / "noise.py").write_text(bundle("pipeline.export.kac_pipeline", "initial_noise"))
        if spec.samples:
            if spec.format == "diffusers":
                images = diffusers_folder.draw(folder, spec.samples, default_device())
                diffusers_folder.check(images, model)
            else:
                images = model.sample(spec.samples).images
            (folder / "samples.png").write_bytes(sheet(images.numpy(), columns=8))
        (folder / "README.md").write_text(card(spec, config, parameters))
        made = sorted(path for path in folder.rglob("*") if path.is_file())
        outputs.check_owner(spec.out, fingerprint)
        for path in made:
            files.write_bytes(files.join(spec.out, path.relative_to(folder).as_posix()), path.read_bytes())
    record = {"fingerprint": fingerprint, "weights_sha256": config.weights_sha256, "format": spec.format}
    files.write_bytes(files.join(spec.out, RECORD_FILE), json.dumps(record, indent=2).encode())
    log.info(f"export: wrote {spec.out}: {spec.format}, {config.network.kind} of {parameters:,} parameters")


def _check_hub(spec: ExportSpec) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(str(spec.push_to_hub))
    except HFValidationError as error:
        raise ArgumentError(f"`push_to_hub` is not a repository OWNER/NAME. {one_line(error)}") from None
    if files.is_uri(spec.out):
        raise ArgumentError(
            f"`push_to_hub` uploads only a local folder, but `out` is {spec.out}. Choose a local `out`."
        )
    if get_token() is None:
        raise ArgumentError("`push_to_hub` needs a Hugging Face token. Set HF_TOKEN, or run `hf auth login`.")


def _push(out: str, repository: str) -> None:
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=out, ignore_patterns=list(OWN_FILES))
    except (HTTPError, OSError) as error:
        raise DistillKacError(
            f"Uploading {out} to {repository} failed ({one_line(error)}). Run the same command again to retry."
        ) from error
    log.info(f"export: uploaded {out} to https://huggingface.co/{repository}")
