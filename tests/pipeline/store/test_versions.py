"""Stores of other versions: missing fields have neutral values, and unknown fields mean a newer version."""

import json
from pathlib import Path

import pytest
from pydantic import Field, create_model

from kac.precision import Precision
from kac.util.options import Options
from pipeline import store as endpoint_store
from pipeline.store.describe import describe
from pipeline.store.layout import NewerVersion, StoreIdentity, parse
from pipeline.store.manifest import Manifest, read_manifest
from pipeline.store.verify import VerifySpec, verify
from tests.pipeline.store.reading import ids
from tests.pipeline.stores import make_spec, make_store, plan_store, run_rollout, shard_file

IDENTITY_VALUES = StoreIdentity.values


class LaterIdentity(StoreIdentity):
    """The identity with a field that a later version may add."""

    clock_shift: float = 0.0
    precision: Precision = Precision(dtype="float32")


def write_like(monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...] = (), **added: object) -> None:
    """Write manifests and footers as a version whose identity has other fields would."""

    def values(identity: StoreIdentity) -> dict:
        own = {name: value for name, value in IDENTITY_VALUES(identity).items() if name not in without}
        return {**own, **added}

    monkeypatch.setattr(StoreIdentity, "values", values)


def test_a_new_field_with_its_default_does_not_change_the_fingerprint(path: Path) -> None:
    manifest = read_manifest(str(path))
    assert manifest is not None
    values = manifest.identity.values()
    assert parse("here", LaterIdentity, json.dumps(values)).fingerprint() == manifest.fingerprint
    assert LaterIdentity(**values, clock_shift=0.5).fingerprint() != manifest.fingerprint


def test_a_store_of_an_older_version_is_read_checked_and_grown(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    with monkeypatch.context() as older:
        write_like(older, without=("knot_grid", "precision"))
        make_store(tmp_path / "old", teacher)
    assert "knot_grid" not in json.loads((tmp_path / "old/manifest.json").read_text())["identity"]
    make_store(tmp_path / "new", teacher)
    store = endpoint_store.open(str(tmp_path / "old"))
    assert store.identity == endpoint_store.open(str(tmp_path / "new")).identity
    assert ids(store.batches(10)) == list(range(100))
    assert verify(VerifySpec(store=store.path)).is_whole
    make_store(tmp_path / "old", teacher, trajectories=200)
    assert verify(VerifySpec(store=store.path)).is_whole
    assert ids(endpoint_store.open(store.path).batches(10)) == list(range(200))


def test_a_finished_store_with_unknown_fields_is_newer_not_damaged(tmp_path: Path, teacher: str) -> None:
    make_store(tmp_path / "new", teacher)
    file = tmp_path / "new/manifest.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "identity": {**values["identity"], "clock_shift": 0.0}}))
    for use in (
        lambda: endpoint_store.open(str(tmp_path / "new")),
        lambda: verify(VerifySpec(store=str(tmp_path / "new"))),
        lambda: plan_store(make_spec(tmp_path / "new", teacher)),
    ):
        with pytest.raises(NewerVersion, match=f"^{tmp_path}/new/manifest.json .*identity.clock_shift"):
            use()


def test_an_unfinished_store_with_unknown_fields_is_newer_and_kept(tmp_path, teacher, monkeypatch, ray_cluster) -> None:
    spec = make_spec(tmp_path / "new", teacher)
    with monkeypatch.context() as newer:
        write_like(newer, clock_shift=0.5)
        newer.setattr(StoreIdentity, "fingerprint", lambda identity: "5e" * 32)
        run_rollout(spec, is_sealed=False)
    for use in (
        lambda: describe(spec.store),
        lambda: plan_store(spec),
        lambda: verify(VerifySpec(store=spec.store, repair=True)),
    ):
        with pytest.raises(NewerVersion, match="unknown field clock_shift"):
            use()
    make_store(tmp_path / "ours", teacher)
    shard_file(spec.store, 0).write_bytes(shard_file(tmp_path / "ours", 0).read_bytes())
    report = verify(VerifySpec(store=spec.store, repair=True))
    assert [problem.kind for problem in report.problems] == ["newer", "newer", "newer", "unfinished"]
    assert report.removed == ()


def test_an_unknown_field_instead_of_a_known_one_is_damage(path: Path) -> None:
    manifest = read_manifest(str(path))
    assert manifest is not None
    values = json.loads(manifest.model_dump_json())
    values["teachex"] = values.pop("teacher")
    with pytest.raises(ValueError, match=r"^`teacher`"):
        parse("here", Manifest, json.dumps(values))
    identity = manifest.identity.values()
    identity["knot_grie"] = identity.pop("knot_grid")
    with pytest.raises(ValueError, match=r"^`knot_grie`"):
        parse("here", StoreIdentity, json.dumps(identity))


def test_a_missing_field_gets_its_neutral_value_not_its_default():
    neutral = {"json_schema_extra": {"neutral": "uniform"}}
    later = create_model("Later", __base__=Options, knots=(int, 20), grid=(str, Field("cosine", **neutral)))
    assert parse("here", later, '{"knots": 4}').grid == "uniform"
    assert parse("here", later, '{"knots": 4, "grid": "cosine"}').grid == "cosine"
