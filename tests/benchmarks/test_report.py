"""From samples to JSON, table, picture and page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import figures, page, picture, table
from benchmarks.__main__ import main, places_of, with_earlier
from benchmarks.figure import Scale
from benchmarks.samples import Check, Finding, Measured, Report, Sample, from_json, to_json
from benchmarks.spread import Spread

ROOT = Path(__file__).parents[2]


def finding(value: float, target: float | None, *, at_least: bool = True, unit: str = "x") -> Finding:
    """A finding with quartiles 10 % around its median."""
    return Finding(f"a thing against {target}", Spread(value, value * 0.9, value * 1.1, 5), unit, target, at_least)


def measured(*findings: Finding, name: str = "pure_nodes", checks: tuple[Check, ...] = ()) -> Measured:
    """A figure with these findings."""
    samples = [Sample("ours", 0, 1.23456789, 0.5, {"p50": 1e-6}), Sample("ours", 1, 2.0, 0.5)]
    return Measured(
        name, "A title", {"rounds": 2, "threads": 1}, {"ours": "Our | way"}, samples, findings, checks, ["a note"]
    )


def report(*each: Measured) -> Report:
    """A report of these figures."""
    facts = {
        "cpu": "a CPU",
        "cores": 2,
        "memory_gib": 4.0,
        "system": "Linux",
        "load_before": [0.1, 0.2, 0.3],
        "gpu": "",
    }
    return Report("2026-11-20T12:00:00+00:00", "full", facts, {"patchbay": {"torch": "2.13.0"}}, list(each))


def test_json_round_trip() -> None:
    """A report survives JSON but for digits that no clock has; samples, findings and checks take one line each."""
    check = Check("ours", "theirs", 1e-6, 0.5, 1e-4, 12)
    text = to_json(report(measured(finding(2.0, 1.0), checks=(check,))))
    back = from_json(text)
    assert back.measured[0].samples[0].wall_s == 1.234568
    assert back.measured[0].findings == [finding(2.0, 1.0)]
    assert back.measured[0].checks == [check]
    assert sum('"wall_s"' in line for line in text.splitlines()) == 2
    assert to_json(back) == text


def test_another_format_is_refused() -> None:
    """JSON of another version is not read as if it were this one's."""
    plain = {**json.loads(to_json(report())), "format": 0}
    with pytest.raises(ValueError, match="measure again"):
        from_json(json.dumps(plain))


def test_verdicts() -> None:
    """Met, missed by a factor, or nothing to meet; and no verdict at all over unequal work."""
    assert table.verdict(finding(3.0, 2.5)) == "met"
    assert table.verdict(finding(2.0, 2.5)) == "missed by 1.25x"
    assert table.verdict(finding(2.0, 1.0, at_least=False)) == "missed by 2.00x"
    assert table.verdict(finding(1.0, 1.0, at_least=False)) == "met"
    assert table.verdict(finding(-1.0, 2.5)) == "missed"
    assert table.verdict(finding(3.0, None)) == ""
    assert table.verdict(finding(3.0, 2.5), trusted=False) == "values differ"


def test_equal_work() -> None:
    """Values must be close, and must vary by much more than they are apart; constant ones show nothing."""
    good = Check("a", "b", largest=1e-6, spread=0.5, tolerance=1e-4, values=10)
    assert good.equal
    assert not dataclasses.replace(good, largest=1e-3).equal
    assert not dataclasses.replace(good, spread=5e-6).equal
    assert not dataclasses.replace(good, largest=0.0, spread=0.0).equal


def test_the_table() -> None:
    """One row a finding with its quartiles, and how many targets were met; an error is a row too."""
    failed = Measured("fairness", "Fairness", failed=["flooded"], error="the service did not start\nits log")
    text = table.text([measured(finding(3.0, 2.5), finding(4.0, None)), failed])
    assert "Fairness: flooded failed" in text
    assert "a thing against 2.5   3.00x (2.70 to 3.30)  at least 2.5x  met" in text
    assert "Fairness              not measured                         the service did not start" in text
    assert text.endswith("1 of 1 targets met.")


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"), (0.01234, "0.0123"), (0.0, "0")]
)
def test_three_digits(value: float, text: str) -> None:
    """Numbers have three significant digits and no exponent."""
    assert table.number(value) == text


def test_the_picture_is_the_same_for_the_same_report(tmp_path: Path) -> None:
    """Drawing twice gives equal bytes, so that a committed picture changes only with its report."""
    pytest.importorskip("matplotlib")
    shown = [measured(finding(3.0, 2.5), finding(900.0, 2.5), finding(0.0001, 0.5, unit="ms"))]
    for name in ("a.svg", "b.svg"):
        picture.draw(shown, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "at least 2.5x" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_the_page() -> None:
    """The page has the table, the ablation, and a section for each figure with what was measured and checked."""
    check = Check("ours", "theirs", 1e-6, 0.5, 1e-4, 12)
    off = Finding("a sweep|early_stop", Spread(2.0, 2.0, 2.0, 3), "x")
    text = page.page([report(measured(finding(3.0, 2.5), checks=(check,)), measured(off, name="ablation"))])
    assert "| a thing against 2.5 | 3.00x (2.70 to 3.30) | at least 2.5x | met |" in text
    assert "| `early_stop` | 2.00 |" in text
    assert "| Our \\| way | 1,617 (1,426 to 1,809) | 500 | 2 |" in text
    assert "Checked to be equal: 12 values" in text
    assert all(f"## {figures.load(name).title}\n" in text for name in figures.NAMES)


def test_unequal_values_are_said() -> None:
    """A figure whose contenders did not compute the same says so in the table and in its section."""
    check = Check("ours", "theirs", 0.5, 0.5, 1e-4, 12)
    text = page.page([report(measured(finding(3.0, 2.5), checks=(check,)))])
    assert "| values differ |" in text
    assert "**The values differ**: ours from theirs by 0.5" in text


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    """docs/performance.md is generated: no number in it was entered by hand."""
    reports = page.read_results(ROOT / "benchmarks" / "results")
    assert page.page(reports) == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), "run make docs"


def test_a_partial_run_keeps_the_other_figures(tmp_path: Path) -> None:
    """``--only`` replaces the figures that it measured and leaves the others of the file as they are."""
    path = tmp_path / "full.json"
    report(measured(finding(1.0, 2.5)), measured(name="fairness")).write(path)
    merged = with_earlier(report(measured(finding(3.0, 2.5))), path)
    assert [m.name for m in merged.measured] == ["pure_nodes", "fairness"]
    assert merged.measured[0].findings[0].reached.median == 3.0


def test_places_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    """An environment without an interpreter is no environment; paths are absolute and stay links."""
    (tmp_path / "python").symlink_to("/bin/sh")
    found = places_of([f"a={tmp_path / 'python'}", f"b={tmp_path / 'nothing'}"])
    assert found == {"a": str(tmp_path / "python")}


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    """``--list`` names every figure."""
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(figures.NAMES)


@pytest.mark.parametrize("name", figures.NAMES)
@pytest.mark.parametrize("mode", ["full", "quick", "gpu", "tiny"])
def test_every_figure_has_a_plan(name: str, mode: str) -> None:
    """Each figure has, at every scale, contenders of different names whose classes, services and models exist."""
    import importlib

    from benchmarks.models import MODELS

    figure = figures.load(name)
    plan = figure.plan(Scale(mode, 1, ("early_stop", "liveness")))
    names = [c.name for c in plan.contenders]
    assert figure.name == name
    assert plan.contenders
    assert plan.rounds > 0
    assert len(set(names)) == len(names)
    assert set(plan.models) <= set(MODELS)
    module = importlib.import_module(f"benchmarks.figures.{name}")
    for contender in plan.contenders:
        assert hasattr(module, contender.work)
        assert not contender.service or contender.service in plan.services
        assert not contender.against or contender.against in names
