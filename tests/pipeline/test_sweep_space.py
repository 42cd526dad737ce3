"""The students of a sweep: the trials of a grid, chains, the draws of a search, and refused options."""

from pathlib import Path
from typing import Any, get_args

import pytest

from jobs.parsing import parse
from kac.losses import FlowMapConfig
from kac.util.errors import ArgumentError, DistillKacError
from pipeline.config import SweepSpec
from pipeline.sweep import Ledger, sweep
from pipeline.sweep.checks import ranking_metric
from pipeline.sweep.planned_trials import grid_trials, identity, normal_text, plan_trial, search_name
from pipeline.sweep.proposers import PROPOSERS, RandomSearch, search_space
from pipeline.sweep.student_trials import StudentTrials
from tests.pipeline.stages import FEW
from tests.pipeline.stores import make_store


def spec_of(store: str = "/store", out: str = "/out", **options: Any) -> SweepSpec:
    return SweepSpec(**{"optimizer": FEW, "samples": 0, "store": store, "out": out, **options})


def test_each_point_of_the_grid_has_a_folder():
    trials = grid_trials(spec_of(steps=(1, 2), guidance=(0.0, 1.0), grid=["optimizer.updates=5,6"]))
    assert len({trial.spec.out for trial in trials}) == 8
    assert {(p.spec.steps, p.spec.guidance, p.spec.optimizer.updates) for p in trials} == {
        (m, w, n) for m in (1, 2) for w in (0.0, 1.0) for n in (5, 6)
    }
    assert trials[0].name == "steps-1-guidance-0.0-optimizer-updates-5"
    assert trials[0].values == {"steps": 1, "guidance": 0.0, "optimizer.updates": 5}


def test_a_command_line_and_a_mapping_give_the_same_grid():
    parsed = parse(
        SweepSpec,
        ["--store", "s", "--out", "o", "--grid", "steps=1,2", "optimizer.learning-rate=1e-3,2e-3"],
        "sweep",
    )
    mapping = spec_of("s", "o", grid={"steps": [1, 2], "optimizer.learning_rate": [0.001, 2e-3]})
    assert [p.values for p in grid_trials(parsed)] == [p.values for p in grid_trials(mapping)]
    assert identity(parsed) == identity(mapping)


def test_a_flow_map_is_one_student_for_all_step_counts():
    trials = grid_trials(spec_of(steps=(4, 1), guidance=(0.0, "all"), objective="flow-map"))
    assert [(p.name, p.spec.steps, p.spec.guidance) for p in trials] == [
        ("any-steps-guidance-0.0", 4, 0.0),
        ("any-steps-guidance-all", 4, "all"),
    ]
    both = grid_trials(spec_of(grid=["steps=1,2", "objective=endpoint,flow-map"]))
    assert [p.name for p in both] == [
        "steps-1-guidance-0.0-objective-kind-endpoint",
        "any-steps-guidance-0.0-objective-kind-flow-map",
        "steps-2-guidance-0.0-objective-kind-endpoint",
    ]
    assert isinstance(both[1].spec.objective, FlowMapConfig)


def test_equal_numbers_give_the_same_identity_and_different_numbers_another():
    assert normal_text(1) == normal_text("1.0") == normal_text("1e0") == "1"
    assert normal_text(1e-3) == normal_text("0.001") == normal_text("1e-03")
    assert normal_text("1000003") != normal_text("1000005")
    assert normal_text("1.2.3") == "1.2.3"


def test_a_feature_network_of_the_user_ranks_the_trials():
    spec = spec_of(samples=64, features=("pixels", "nets/my.pt"))
    assert ranking_metric(spec) == ("frechet_distance_my", "lower")


def test_students_are_compared_with_the_teacher_of_their_store(teacher: str, tmp_path: Path):
    options = {"solver": "heun", "solver_steps": 4, "knot_grid": "quadratic", "time_factor": 0.9}
    make_store(tmp_path / "store", teacher, trajectories=64, **options)
    flow_map = {"kind": "flow-map", "grids": (1, 2, 4)}
    spec = spec_of(str(tmp_path / "store"), str(tmp_path / "out"), steps=(4, 3), objective=flow_map, samples=64)
    kind = StudentTrials(spec)
    kind.check(grid_trials(spec))
    (planned,) = kind.evaluations([str(tmp_path / "student")])
    assert planned.model_dump(include={"steps", *options}) == {"steps": (4, 3), **options}


def test_shared_options_reach_every_student():
    spec = spec_of(seed=5, precision={"dtype": "bfloat16"}, memory_gib=0.5)
    for trial in grid_trials(spec):
        assert (trial.spec.seed, trial.spec.optimizer, trial.spec.precision.dtype) == (5, FEW, "bfloat16")
        assert (trial.spec.memory_gib, trial.spec.workers) == (0.5, 0)


def test_a_chain_starts_from_the_grid_and_each_student_from_its_predecessor():
    trials = grid_trials(spec_of(chain=["4,2,1"], steps=(1,), guidance=(0.0, 1.0)))
    assert [p.name for p in trials if p.spec.guidance == 0.0] == [
        "steps-1-guidance-0.0",
        "steps-4-guidance-0.0",
        "chain-4-2-guidance-0.0",
        "chain-4-2-1-guidance-0.0",
    ]
    last = trials[-1]
    assert (last.after, last.spec.init) == ("chain-4-2-guidance-1.0", "/out/chain-4-2-guidance-1.0")
    assert last.values == {"guidance": 1.0, "steps": 1, "chain": "4-2-1"}
    independent = grid_trials(spec_of(chain=(4, 2, 1)))
    assert [p.spec.steps for p in independent if p.after is None] == [4, 2, 1], "a grid has the same counts"


def test_a_search_draws_within_its_bounds_by_trial_number():
    spec = spec_of(
        search=["optimizer.learning-rate=loguniform(1e-4, 3e-3)", "optimizer.updates=randint(3,5)"],
        trials=8,
        grid=["steps=1,2"],
    )
    proposer = RandomSearch(spec, Ledger("/out"))
    trials = [plan_trial(spec, proposer.propose(n), search_name(n)) for n in range(40)]
    assert all(1e-4 <= p.spec.optimizer.learning_rate <= 3e-3 for p in trials)
    assert {p.spec.optimizer.updates for p in trials} == {3, 4, 5}
    assert {p.spec.steps for p in trials} == {1, 2} and {p.spec.guidance for p in trials} == {0.0}
    assert proposer.propose(7) == RandomSearch(spec, Ledger("/out")).propose(7)
    again = plan_trial(spec, trials[7].values, trials[7].name)
    assert again == trials[7], "the values in a trial's record give the same student"


def test_each_searcher_has_an_option():
    assert tuple(PROPOSERS) == get_args(SweepSpec.model_fields["searcher"].annotation)


@pytest.mark.parametrize(
    "text",
    [
        "loguniform(1e-4,3e-3",
        "loguniform(0,1)",
        "uniform(2,1)",
        "randint(1.5,3)",
        "choice()",
        "exit(1)",
        "uniform(1)",
        "3",
    ],
)
def test_an_expression_that_cannot_be_parsed_is_refused(text: str):
    with pytest.raises(ArgumentError, match=r"`search` .* optimizer\.learning-rate"):
        search_space(spec_of(search={"optimizer.learning-rate": text}, trials=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": ["colour=1"]}, "^colour .*optimizer"),
        ({"grid": ["store=a,b"]}, "^store "),
        ({"grid": ["optimizer.speed=1"]}, "^`optimizer.speed`"),
        ({"grid": ["optimizer.updates=x"]}, "^`optimizer.updates`"),
        ({"grid": ["optimizer.updates"]}, "^`grid`.*FIELD=VALUE"),
        ({"grid": ["optimizer.updates="]}, "grid`.*optimizer.updates"),
        ({"grid": {"optimizer.updates": []}}, "grid`.*optimizer.updates"),
        ({"steps": ()}, "^`steps`"),
        ({"grid": ["steps=1,2"], "steps": (1,)}, "^`steps` .*`grid`"),
        ({"grid": ["steps=1,3"]}, "^`steps`"),
        ({"guidance": (0.0, 0.5)}, "^`guidance` 0.5 .*`rollout`"),
        ({"trials": 3}, "^`search` .*`trials`"),
        ({"search": ["optimizer.updates=uniform(1000,2000)"], "trials": 3}, "^`optimizer.updates`"),
        ({"search": ["optimizer.updates=randint(1,2)"]}, "^`trials` .*`search`"),
        ({"metric": "beauty"}, "^`metric` is beauty"),
        ({"metric": "frechet_distance_pixels"}, "^`metric` .*`samples` 0"),
        ({"asha": True, "asha_metric": "frechet_distance_pixels"}, "^`asha_metric`"),
        ({"asha": True, "grace_updates": 60}, "^`grace_updates` is 60"),
        (
            {"asha": True, "grace_updates": 9, "validation_updates": 0},
            "^`validation_updates` is 0.*`asha` .*validation/energy_distance",
        ),
        (
            {"asha": True, "grace_updates": 9, "asha_metric": "validation/endpoint_error"},
            "^`held_out_rows` .*`asha`",
        ),
        ({"chain": (1, 2)}, "^`chain`"),
        ({"chain": (4, 2), "asha": True}, "^`chain` .*`asha`"),
    ],
)
def test_invalid_options_are_refused_in_one_line_before_anything_is_written(
    options: dict[str, Any], message: str, small_store: str, tmp_path: Path
):
    with pytest.raises(DistillKacError, match=message) as error:
        sweep(
            spec_of(
                small_store, str(tmp_path / "out"), **{"steps": (1, 2), **options} if "grid" not in options else options
            )
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["grid", "search"])
def test_an_empty_grid_or_search_is_refused(name: str):
    with pytest.raises(ArgumentError, match=f"`{name}`|--{name}"):
        parse(SweepSpec, ["--store", "/store", "--out", "/out", f"--{name}"], "sweep")
