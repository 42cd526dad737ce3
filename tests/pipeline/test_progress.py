"""Progress: a bar on a terminal, and plain lines elsewhere."""

import pytest

from pipeline import progress
from pipeline.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The current time, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_every_20_seconds_and_at_the_end(clock, capsys):
    with ProgressBar("teach", 1000, "updates", done=200) as bar:
        for second in range(1, 41):
            clock[0] = 100 + second
            bar.update(20, "loss 0.5" if second < 30 else "loss 0.25")
    assert capsys.readouterr() == (
        "teach: resuming after 200 of 1,000 updates\n",
        "teach: 600 of 1,000 updates, 20 per second, about 20 seconds left, loss 0.5\n"
        "teach: 1,000 of 1,000 updates, 20 per second, loss 0.25\n",
    )


def test_a_hidden_bar_prints_nothing(clock, capsys):
    with ProgressBar("teach", 10, "updates", is_shown=False) as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setenv(progress.TERMINAL_VARIABLE, "1")
    with ProgressBar("teach", 10, "updates") as bar:
        bar.update(10)
        bar.write("a line")
    out, err = capsys.readouterr()
    assert "teach: 100%" in err
    assert "10/10" in err
    assert out == "a line\n"
