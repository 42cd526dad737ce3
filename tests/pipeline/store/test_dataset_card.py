"""The dataset card: its examples run as written, and its front matter lets ``datasets`` read the store."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard

from kac.data import DataConfig
from kac.model import load_config
from kac.util.errors import ArgumentError
from pipeline.config import RolloutSpec
from pipeline.store.dataset_card import GENERATED
from pipeline.store.merge import MergeSpec, merge
from tests.kac.data import making
from tests.pipeline.store.reading import read_all
from tests.pipeline.stores import make_store, make_teacher

NAMES = ("no", "1", "été: 2", "deer, wild")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` works offline, with an empty cache."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.fixture(scope="module")
def named(folder: Path) -> str:
    """The model folder of a teacher of images [3, 8, 8] whose classes have names."""
    pixels = making.pixels(48)
    for part, rows in (("train", slice(0, 36)), ("test", slice(36, 48))):
        making.write_folder(folder / "images" / part, pixels[rows], np.arange(48)[rows] % 4, names=sorted(NAMES))
    return make_teacher(folder / "named", data=DataConfig(kind="folder", root=str(folder / "images")))


def card(store: Path) -> str:
    return (store / "README.md").read_text(encoding="utf-8")


def front_matter(store: Path) -> dict[str, Any]:
    return yaml.safe_load(card(store).split("\n---\n")[0])


def run_examples(store: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the card's code blocks as written, and return the variables of each."""
    monkeypatch.chdir(store)
    blocks = re.findall(r"```python\n(.*?)```", card(store), re.DOTALL)
    found: list[dict[str, Any]] = [{} for _ in blocks]
    for block, variables in zip(blocks, found, strict=True):
        exec(block, variables)
    return found


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"source": "forward"}], ids=str)
def test_the_examples_return_the_states_in_their_shape(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    make_store(tmp_path / "store", named, guidance=(0.0, 1.5), **options)
    hugging_face, arrow, duck = run_examples(tmp_path / "store", monkeypatch)
    last = "knot_end" if "source" in options else "knot_04"
    of_scales = [read_all(tmp_path / "store", w) for w in (0.0, 1.5)]
    expected = of_scales[0][last]
    assert expected.shape == (100, 3, 8, 8)
    np.testing.assert_array_equal(hugging_face["states"], expected)
    np.testing.assert_array_equal(arrow["states"], expected)
    np.testing.assert_array_equal(duck["states"], np.concatenate([rows[last] for rows in of_scales]))
    rows = hugging_face["rows"]
    assert rows["label"][:] == of_scales[0]["label"].tolist()
    assert rows.features["label"].names == sorted(NAMES)
    assert rows.column_names == list(of_scales[0])


def test_datasets_selects_columns_and_streams(teacher: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    make_store(tmp_path / "store", teacher, guidance=(0.0, 1.5))
    options = {"name": "guidance=1.5", "split": "train", "columns": ["sample_id", "knot_00"]}
    expected = read_all(tmp_path / "store", 1.5)["knot_00"]
    for is_streaming in (False, True):
        rows = load_dataset(str(tmp_path / "store"), streaming=is_streaming, **options)
        np.testing.assert_array_equal(np.stack([row["knot_00"] for row in rows]).astype(np.float32), expected)
    with pytest.raises(ValueError, match=r"guidance=1\.5"):  # the error lists the scales
        load_dataset(str(tmp_path / "store"))


def test_the_card_describes_the_store_without_machine_paths(named: str, tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", named, guidance=(0.0, 1.5), license="cc-by-4.0")
    text = card(tmp_path / "store")
    data = DatasetCard(text, ignore_metadata_errors=False).data.to_dict()
    assert data == front_matter(tmp_path / "store")
    assert data["license"] == "cc-by-4.0"
    assert data["size_categories"] == ["n<1K"]
    assert data["class_names"] == sorted(NAMES)
    assert [config["config_name"] for config in data["configs"]] == ["guidance=0.0", "guidance=1.5"]
    identity = manifest.identity
    facts = ("`named`", identity.teacher_sha256, str(identity.path), "8 steps", "guidance=1.5 100", "3=")
    for fact in (*facts, manifest.fingerprint, "float32 [3, 8, 8]", "t = 1, 0.75, 0.5, 0.25, 0 "):
        assert fact in text, fact
    assert str(tmp_path.parent) not in text
    make_store(tmp_path / "other", named)
    assert "license" not in front_matter(tmp_path / "other")


def test_the_null_label_of_an_unconditional_teacher_has_no_class_name(named: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    data = load_config(named).data
    make_store(tmp_path / "store", make_teacher(tmp_path / "teacher", data=data, conditioning="none"))
    rows = load_dataset(str(tmp_path / "store"), split="train")
    assert set(rows["label"][:]) == {len(NAMES)}
    assert "null label" in card(tmp_path / "store")


def test_growth_rewrites_the_card_and_keeps_its_license(named: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    store = tmp_path / "store"
    make_store(store, named, license="mit")
    assert len(load_dataset(str(store), "guidance=0.0", split="train")) == 100
    make_store(store, named, trajectories=1100, guidance=(0.0, 2.0))
    assert front_matter(store)["license"] == "mit"
    assert front_matter(store)["size_categories"] == ["1K<n<10K"]
    assert len(load_dataset(str(store), "guidance=0.0", split="train")) == 1100
    assert len(load_dataset(str(store), "guidance=2.0", split="train")) == 1100
    make_store(store, named, trajectories=1100, guidance=(0.0, 2.0), license="apache-2.0")  # nothing else to do
    assert front_matter(store)["license"] == "apache-2.0"


def test_a_merged_store_has_the_class_names_and_the_license_of_the_first_store(named: str, tmp_path: Path) -> None:
    for first, name in ((0, "one"), (128, "two")):
        make_store(tmp_path / name, named, first_sample=first, license="mit")
    merge(MergeSpec(stores=(str(tmp_path / "one"), str(tmp_path / "two")), into=str(tmp_path / "merged")))
    merged = front_matter(tmp_path / "merged")
    assert merged == front_matter(tmp_path / "one")
    assert (merged["license"], merged["class_names"]) == ("mit", sorted(NAMES))
    assert "guidance=0.0 200" in card(tmp_path / "merged")


def test_a_card_of_a_user_is_kept(teacher: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_store(store, teacher)
    owns = (card(store).replace(GENERATED, "My words."), "My words.", "---\n: [broken\n---\n")
    for trajectories, own in zip((200, 300, 400), owns, strict=True):
        (store / "README.md").write_text(own, encoding="utf-8")
        make_store(store, teacher, trajectories=trajectories)
        assert card(store) == own
    (store / "README.md").write_text(f"---\n: [broken\n---\n{GENERATED}\n", encoding="utf-8")
    make_store(store, teacher, trajectories=500)
    assert "configs" in front_matter(store)


def test_a_finished_store_without_a_card_stays_as_it_is(teacher: str, tmp_path: Path) -> None:
    make_store(tmp_path / "store", teacher)
    (tmp_path / "store" / "README.md").unlink()
    make_store(tmp_path / "store", teacher)
    assert not (tmp_path / "store" / "README.md").exists()


def test_a_license_is_an_identifier_of_the_hub() -> None:
    with pytest.raises(ArgumentError, match="license"):
        RolloutSpec(teacher="t", store="s", license="My License")
