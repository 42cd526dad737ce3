"""Counter-based noise and labels: row i depends only on (seed, i), and the stream never changes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kac import noise as noises
from kac.path import GaussianPath, KacPath
from kac.process import KacProcess

PATHS = [KacPath(), KacPath(KacProcess(9, 3), clock="linear"), GaussianPath()]
SEEDS = st.integers(0, 2**31 - 1)
SHAPES = st.sampled_from([(2,), (3,), (1, 4, 4), (1,)])


@st.composite
def splits(draw) -> list[range]:
    """Draw a range of ids, split at random positions."""
    start = draw(st.one_of(st.integers(0, 1000), st.integers(2**40, 2**40 + 10)))
    cuts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    edges = [start]
    for cut in cuts:
        edges.append(edges[-1] + cut)
    return [range(lower, upper) for lower, upper in itertools.pairwise(edges)]


def whole(parts: list[range]) -> range:
    return range(parts[0].start, parts[-1].stop)


# Independence of rows


@settings(deadline=None, max_examples=60)
@given(SEEDS, splits(), st.integers(1, 13), st.integers(0, 2))
def test_uniforms_of_a_range_are_the_uniforms_of_its_parts(seed, parts, width, stream):
    together = noises.uniforms(seed, stream, whole(parts), width)
    assert together.shape == (len(whole(parts)), width)
    assert together.dtype == torch.float64
    assert bool(((together > 0) & (together < 1)).all())
    assert torch.equal(together, torch.cat([noises.uniforms(seed, stream, part, width) for part in parts]))


@settings(deadline=None, max_examples=60)
@given(SEEDS, splits(), SHAPES, st.sampled_from(PATHS))
def test_noise_of_a_range_is_the_noise_of_its_parts(seed, parts, shape, path):
    together = noises.noise(path, seed, whole(parts), shape)
    assert together.shape == (len(whole(parts)), *shape)
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.cat([noises.noise(path, seed, part, shape) for part in parts]))


@settings(deadline=None, max_examples=60)
@given(SEEDS, splits(), st.lists(st.floats(0.05, 1), min_size=1, max_size=12))
def test_labels_and_data_points_of_a_range_match_its_parts(seed, parts, weights):
    shares = [weight / sum(weights) for weight in weights]
    together = noises.labels(seed, whole(parts), shares)
    assert together.dtype == torch.int64
    assert 0 <= together.min().item() <= together.max().item() < len(shares)
    assert torch.equal(together, torch.cat([noises.labels(seed, part, shares) for part in parts]))

    point, interval = noises.data_points(seed, whole(parts), 1797, 20)
    apart = [noises.data_points(seed, part, 1797, 20) for part in parts]
    assert torch.equal(point, torch.cat([p for p, _ in apart]))
    assert torch.equal(interval, torch.cat([i for _, i in apart]))


def test_noise_ignores_global_state_and_earlier_calls():
    torch.manual_seed(0)
    first = noises.noise(KacPath(), 3, range(10), (4,))
    torch.manual_seed(1)
    noises.noise(KacPath(), 4, range(10), (4,))
    assert torch.equal(noises.noise(KacPath(), 3, range(10), (4,)), first)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_noise_is_the_same_on_any_number_of_threads(path):
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            drawn.append(noises.noise(path, 5, range(2000), (1, 8, 8)))  # large enough for torch to use several threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_an_empty_range_gives_no_rows():
    assert noises.uniforms(0, 0, range(5, 5), 3).shape == (0, 3)
    assert noises.noise(KacPath(), 0, range(0), (1, 8, 8)).shape == (0, 1, 8, 8)
    assert noises.labels(0, range(0), [0.5, 0.5]).shape == (0,)


def test_refuses_ids_with_gaps():
    """Rows are drawn contiguously, so ids with a step of 2 would get the rows of their neighbours."""
    with pytest.raises(ValueError, match="step"):
        noises.uniforms(0, 0, range(0, 10, 2), 3)


# Different seeds and streams


@settings(deadline=None, max_examples=40)
@given(st.sets(SEEDS, min_size=2, max_size=2))
def test_seeds_and_streams_share_no_numbers(seeds):
    """No number repeats across the rows and streams of these seeds and of each seed + 1."""
    keys = [(seed, stream) for seed in {*seeds, *(seed + 1 for seed in seeds)} for stream in range(3)]
    rows = torch.stack([noises.uniforms(seed, stream, range(50), 8) for seed, stream in keys])
    assert len(rows.flatten().unique()) == rows.numel()


def test_noise_labels_and_data_points_use_separate_streams():
    assert len({noises.NOISE_STREAM, noises.LABEL_STREAM, noises.DATA_STREAM}) == 3
    ids = range(20_000)
    noise = noises.noise(GaussianPath(), 0, ids, (1,))[:, 0].double()
    label = noises.labels(0, ids, [0.1] * 10).double()
    point, interval = noises.data_points(0, ids, 1000, 20)
    table = torch.corrcoef(torch.stack([noise, label, point.double(), interval.double()])) - torch.eye(4)
    assert table.abs().max().item() < 5.5 / len(ids) ** 0.5


# Distributions


def test_uniforms_are_uniform_in_every_column_and_row():
    draws = noises.uniforms(0, noises.NOISE_STREAM, range(20_000), 6)
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-7
    one_row = noises.uniforms(0, noises.NOISE_STREAM, range(7, 8), 20_000)[0]
    assert stats.kstest(one_row.numpy(), "uniform").pvalue > 1e-7
    table = torch.corrcoef(torch.cat([draws[:-1], draws[1:]], dim=1).T) - torch.eye(12)
    assert table.abs().max().item() < 5.5 / 20_000**0.5


def test_kac_noise_follows_the_cdf():
    path = KacPath(KacProcess(3.0, 2.0))
    noise = noises.noise(path, 1, range(25_000), (4,)).double().flatten()
    grid = torch.linspace(-1.999, 1.999, 301, dtype=torch.float64)
    empirical = torch.searchsorted(noise.sort().values, grid, right=True) / len(noise)
    assert (empirical - path.process.cdf(grid, 1.0)).abs().max().item() < 0.0092
    assert noise.var().item() == pytest.approx(path.process.variance(1.0).item(), rel=0.03)
    columns = torch.corrcoef(noise.reshape(-1, 4).T) - torch.eye(4)
    assert columns.abs().max().item() < 5.5 / 25_000**0.5


def test_labels_follow_the_class_frequencies():
    shares = [0.5, 0.0, 0.25, 0.2, 0.05, 0.0]
    counts = torch.bincount(noises.labels(2, range(40_000), shares), minlength=6)
    assert counts[[1, 5]].tolist() == [0, 0]
    kept = [0, 2, 3, 4]
    assert stats.chisquare(counts[kept].numpy(), [shares[k] * 40_000 for k in kept]).pvalue > 1e-7
    assert noises.labels(2, range(100), [1.0]).tolist() == [0] * 100


def test_data_points_are_uniform_and_cover_their_range():
    point, interval = noises.data_points(3, range(40_000), 100, 20)
    assert (point.min().item(), point.max().item()) == (0, 99)
    assert (interval.min().item(), interval.max().item()) == (0, 19)
    assert stats.chisquare(torch.bincount(point).numpy()).pvalue > 1e-7
    assert stats.chisquare(torch.bincount(interval).numpy()).pvalue > 1e-7


# The stream: a rerun must reproduce stores written earlier


def test_the_stream_never_changes():
    assert noises.uniforms(0, noises.NOISE_STREAM, range(2), 5).tolist() == GOLDEN_UNIFORMS
    assert noises.uniforms(2**31 - 1, noises.DATA_STREAM, range(2**40, 2**40 + 1), 3).tolist() == GOLDEN_FAR
    assert noises.labels(0, range(12), [0.1] * 10).tolist() == GOLDEN_LABELS
    point, interval = noises.data_points(0, range(4), 1797, 20)
    assert (point.tolist(), interval.tolist()) == GOLDEN_POINTS
    kac = noises.noise(KacPath(KacProcess(9, 3)), 0, range(2), (3,))
    torch.testing.assert_close(kac, torch.tensor(GOLDEN_KAC), rtol=1e-6, atol=1e-6)
    gaussian = noises.noise(GaussianPath(), 0, range(2), (3,))
    torch.testing.assert_close(gaussian, torch.tensor(GOLDEN_GAUSSIAN), rtol=1e-6, atol=1e-6)


GOLDEN_UNIFORMS = [
    [0.011546754286331562, 0.24154919656271823, 0.11142585551493822, 0.5644146216071338, 0.5023796042735055],
    [0.253822740392485, 0.19505057563074713, 0.7117099077319217, 0.13126466534069492, 0.5724548284695404],
]
GOLDEN_FAR = [[0.9487796554914519, 0.06984827385237391, 0.9854524056979069]]
GOLDEN_LABELS = [8, 7, 5, 3, 1, 7, 8, 5, 4, 5, 6, 2]
GOLDEN_POINTS = ([1463, 1472, 1512, 1754], [8, 13, 6, 4])
GOLDEN_KAC = [[1.5947886, 1.262804, -0.0456297], [0.693249, -1.4977151, 0.8023549]]
GOLDEN_GAUSSIAN = [[-2.2718842, -0.7013279, -1.2189802], [0.0059648, -0.5899694, 1.6122322]]
