"""Guidance: the formula, its cost in network calls, and a check that the formula occurs only once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kac
from kac.guidance import guide
from kac.networks import MLPConfig, build_network

ROOT = Path(kac.__file__).parents[1]
NULL = 7
WEIGHTS = st.floats(-2, 10).filter(lambda w: w != 0)


class Spy:
    """Computes u(x, t, label) = x (t + label), and records its calls."""

    null_label = NULL

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, label):
        self.calls.append((x, t, label))
        return x * (t.reshape(-1, 1) + label[:, None])


X = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.0, 4.0]], dtype=torch.float64)
LABEL = torch.tensor([2, 0, 5])
TIMES = [torch.tensor(0.25, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)]


@pytest.mark.parametrize("t", TIMES, ids=["scalar", "batch"])
def test_without_guidance_the_network_is_called_once_on_the_original_batch(t):
    spy = Spy()
    guided = guide(spy, 0.0, LABEL)
    u = guided(X, t)
    assert guided.nfe_per_call == 1
    ((x, t_seen, label),) = spy.calls
    assert torch.equal(x, X)
    assert torch.equal(t_seen, t)
    assert torch.equal(label, LABEL)
    assert torch.equal(u, Spy()(X, t, LABEL))


@pytest.mark.parametrize("null_label", [NULL, None])
def test_a_network_is_guided_by_its_guide_instead_of_the_null_label(null_label):
    spy = Spy()
    spy.null_label, spy.guide = null_label, Spy()
    guided = guide(spy, 0.5, LABEL)
    u = guided(X, TIMES[1])
    assert guided.nfe_per_call == 2
    assert len(spy.calls) == len(spy.guide.calls) == 1
    assert torch.equal(spy.guide.calls[0][2], LABEL)
    torch.testing.assert_close(u, Spy()(X, TIMES[1], LABEL))
    spy.guide = lambda x, t, label: torch.zeros_like(x)
    torch.testing.assert_close(guide(spy, 0.5, LABEL)(X, TIMES[1]), 1.5 * Spy()(X, TIMES[1], LABEL))


@settings(deadline=None, max_examples=25)
@given(WEIGHTS, st.sampled_from(TIMES))
def test_guidance_is_one_call_on_a_doubled_batch(w, t):
    spy = Spy()
    guided = guide(spy, w, LABEL)
    u = guided(X, t)
    assert guided.nfe_per_call == 2
    ((x, t_seen, label),) = spy.calls
    assert torch.equal(x, torch.cat([X, X]))
    assert torch.equal(t_seen, t if t.ndim == 0 else torch.cat([t, t]))
    assert label.tolist() == [*LABEL.tolist(), NULL, NULL, NULL]
    expected = (1 + w) * Spy()(X, t, LABEL) - w * Spy()(X, t, torch.full_like(LABEL, NULL))
    torch.testing.assert_close(u, expected, rtol=1e-14, atol=0)


def test_values_by_hand():
    """t + label = 2.25 and t + null = 7.25: w = 1 gives x (2 * 2.25 - 7.25), w = -1 gives the null field."""
    x, label, t = torch.tensor([[1.0]]), torch.tensor([2]), torch.tensor(0.25)
    assert guide(Spy(), 1.0, label)(x, t).item() == -2.75
    assert guide(Spy(), -1.0, label)(x, t).item() == 7.25


def test_the_network_receives_conditions_with_and_without_guidance():
    class ConditionedSpy(Spy):
        def __call__(self, x, t, label, end_time):
            return super().__call__(x, t, label) + end_time

    for w in (0.0, 1.5):
        field = guide(ConditionedSpy(), w, LABEL, lambda t: {"end_time": t / 2})
        torch.testing.assert_close(field(X, TIMES[0]), guide(Spy(), w, LABEL)(X, TIMES[0]) + TIMES[0] / 2)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_a_time_factor_changes_only_the_time_that_networks_receive(w, t):
    velocity = guide(Spy(), w, LABEL, time_factor=0.5)(X, t)
    torch.testing.assert_close(velocity, guide(Spy(), w, LABEL)(X, t / 2), rtol=0, atol=0)
    assert not torch.equal(velocity, guide(Spy(), w, LABEL)(X, t))


def test_guidance_combines_two_velocities_of_a_real_network():
    torch.manual_seed(0)
    network = build_network(MLPConfig(width=16, depth=2), (2,), NULL).double()
    torch.nn.init.normal_(network.leave[1].weight)
    for t in TIMES:
        u, u_null = network(X, t, LABEL), network(X, t, torch.full_like(LABEL, NULL))
        assert not torch.allclose(u, u_null)
        torch.testing.assert_close(guide(network, 2.0, LABEL)(X, t), 3 * u - 2 * u_null)


# No second copy of the formula


def same(left: ast.AST, right: ast.AST) -> bool:
    return ast.dump(left) == ast.dump(right)


def factors(node: ast.AST) -> list[ast.AST]:
    return [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) else []


def weights_plus_one(node: ast.AST) -> list[ast.AST]:
    """Return the expression w of each factor (1 + w) or (w + 1)."""
    sums = [f for f in factors(node) if isinstance(f, ast.BinOp) and isinstance(f.op, ast.Add)]
    pairs = [pair for f in sums for pair in ((f.left, f.right), (f.right, f.left))]
    return [w for one, w in pairs if isinstance(one, ast.Constant) and one.value == 1]


def is_guidance(node: ast.AST) -> bool:
    """Detect (1 + w) u - w u_null or u + w (u - u_null) with any names, or u_null + s (u - u_null) with these names."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)):
        return False
    if isinstance(node.op, ast.Sub):
        return any(same(w, f) for w in weights_plus_one(node.left) for f in factors(node.right))
    differences = [f for f in factors(node.right) if isinstance(f, ast.BinOp) and isinstance(f.op, ast.Sub)]
    ahead = any(same(d.left, node.left) for d in differences)
    names = ast.dump(node).lower()
    return ahead or (bool(differences) and ("null" in names or "uncond" in names))


def copies(source: str) -> Iterator[int]:
    return (node.lineno for node in ast.walk(ast.parse(source)) if is_guidance(node))


@pytest.mark.parametrize(
    "formula",
    ["(1 + w) * u - w * n", "u * (self.w + 1.0) - n * self.w", "u + w * (u - n)", "u_null + s * (u - u_null)"],
)
def test_the_search_finds_the_formula(formula):
    assert list(copies(f"x = {formula}")) == [1]


@pytest.mark.parametrize(
    "other", ["(1 + r / 2) * u", "ema + (1 - d) * (p - ema)", "h * (1 + scale) + shift", "a - w * b"]
)
def test_the_search_ignores_other_formulas(other):
    assert not list(copies(f"x = {other}"))


def test_the_project_contains_the_formula_once():
    places = [
        (path.relative_to(ROOT).as_posix(), line)
        for folder in ("kac", "pipeline", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in copies(path.read_text())
    ]
    assert [path for path, _ in places] == ["kac/guidance.py"], places
