import time

from emergency_kit.evaluation import console


def test_progress_speaks_while_nothing_finishes_and_says_what_is_left(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    with console.Progress("tuned", 4) as progress:
        time.sleep(0.2)
        silent = capsys.readouterr().out
        progress.update(2.5, 100)
        time.sleep(0.2)
        halfway = capsys.readouterr().out
        progress.update(4.0, 160)
    assert silent.startswith("  tuned: 0 of 4 answers") and "left" not in silent
    assert "tuned: 2 of 4 answers" in halfway and "s left" in halfway
    last = capsys.readouterr().out.splitlines()[-1]
    assert "4 of 4 answers" in last and "left" not in last
