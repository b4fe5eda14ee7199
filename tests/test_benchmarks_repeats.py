"""Streaks: a failure costs a test all that it had; what was skipped says nothing."""

from __future__ import annotations

from pathlib import Path

from benchmarks.repeats import count, read_outcomes

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="passes" />
<testcase classname="tests.a" name="fails"><failure message="no">text</failure></testcase>
<testcase classname="tests.a" name="skipped"><skipped message="no root" /></testcase>
<testcase classname="tests.a" name="leaves_something" />
<testcase classname="tests.a" name="leaves_something"><error message="teardown" /></testcase>
</testsuite></testsuites>"""


def test_a_round_is_read_from_its_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert read_outcomes(tmp_path / "report.xml") == {
        "tests.a::passes": True,
        "tests.a::fails": False,
        "tests.a::leaves_something": False,
    }


def test_a_failure_ends_the_streak() -> None:
    streaks = {"a": 3, "b": 7}
    assert count({"a": True, "b": False, "new": True}, streaks) == ["b"]
    assert streaks == {"a": 4, "b": 0, "new": 1}
