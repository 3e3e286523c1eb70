"""Bars on a terminal's stderr: what they count, and silence where nobody watches."""

import pytest

from polymamba.core.terminal import progress_bar


@pytest.mark.parametrize(("total", "done", "shown"), [(7, 3, "3/7"), (1_000_000, 250_000, "25%"), (0, 0, "0/0")])
def test_a_bar_counts_what_can_be_counted(total, done, shown, monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
        with progress_bar("looking", total, "images") as advance:
            advance(done)
        out, err = capsys.readouterr()
        assert out == ""
        assert (shown in err and "looking" in err) if terminal else not err
