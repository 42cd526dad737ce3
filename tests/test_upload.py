"""The files that `ray job submit --working-dir .` uploads, found by Ray's own code."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

MAX_BYTES = 1_200_000


@pytest.fixture
def checkout(project_root: Path, tmp_path: Path) -> Path:
    """The files in git, and typical untracked files of a checkout in use."""
    folder = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=project_root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (project_root / name).exists():  # git also lists files whose removal is not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(project_root / name, folder / name)
    clutter = (
        *("runs/teacher/model.safetensors", "mlflow.db", "mlflow.db-journal", "mlartifacts/1/a", "report.html"),
        *(".venv/bin/python", ".venv-3.12/x", ".git/objects/pack", "kac/__pycache__/path.pyc", ".mypy_cache/a.json"),
    )
    for name in clutter:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 1000)
    return folder


@pytest.mark.parametrize("include_gitignore", [True, False], ids=["with .gitignore", "without"])
def test_the_upload_is_small_and_complete(checkout: Path, tmp_path: Path, include_gitignore: bool):
    package = tmp_path / "package.zip"

    def upload(folder: str, excludes: list[str] | None, is_file: bool = False) -> None:
        create_package(folder, package, include_gitignore=include_gitignore, excludes=excludes)

    upload_working_dir_if_needed({"working_dir": str(checkout)}, include_gitignore=include_gitignore, upload_fn=upload)
    assert package.stat().st_size < MAX_BYTES
    uploaded = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    needed = {
        str(path.relative_to(checkout))
        for package_name in ("kac", "pipeline", "jobs")
        for pattern in ("*.py", "*.yaml")
        for path in (checkout / package_name).rglob(pattern)
    }
    assert len(needed) > 100
    assert needed <= uploaded
    assert {name.partition("/")[0] for name in uploaded - needed} <= {
        "kac",
        "pipeline",
        "jobs",
        ".gitignore",
        ".rayignore",
    }


def test_modules_of_the_user_are_uploaded(checkout: Path, tmp_path: Path):
    """A user's own network may be a module in the working directory."""
    (checkout / "mynets").mkdir()
    (checkout / "mynets/flow.py").write_text("")
    create_package(str(checkout), tmp_path / "package.zip", include_gitignore=True)
    assert "mynets/flow.py" in zipfile.ZipFile(tmp_path / "package.zip").namelist()
