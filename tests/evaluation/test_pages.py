"""Pages and charts: what goes in is escaped, what comes out is well-formed and in its place."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.charts import HEIGHT, WIDTH, Series, line_chart, ticks
from shallowfusion.evaluation.pages import Cell, difference_html, page, section, table, write_page


def test_text_is_escaped_and_html_cells_are_not() -> None:
    shown = table(["<a>", "n"], [["<b> & c", 1], [Cell("<i>x</i>"), -2.5]], {1: "chosen"})
    assert "&lt;a&gt;" in shown
    assert "&lt;b&gt; &amp; c" in shown
    assert "<i>x</i>" in shown
    assert shown.count('<td class="number">') == 2
    assert shown.count("<tr class='chosen'>") == 1
    whole = page("T <1>", "lead & more", [section("S <2>", shown)])
    assert "<title>T &lt;1&gt;</title>" in whole
    assert "lead &amp; more" in whole


def test_differences_show_what_was_said_and_what_was_heard() -> None:
    assert difference_html("the renal cyst", "the renal <sister>") == (
        "the renal <del>cyst</del> <ins>&lt;sister&gt;</ins>"
    )
    assert difference_html("a b", "a b c") == "a b <ins>c</ins>"
    assert difference_html("a b", "b") == "<del>a</del> b"


def test_charts_are_well_formed_and_inside_the_picture() -> None:
    points = [(0.0, 21.0), (0.5, 12.0), (1.0, 9.0)]
    chart = line_chart(
        [Series("a & b", points, [(y - 3, y + 3) for _, y in points]), Series("steps", points, is_step=True)],
        "weight", "errors, %", ("alone", 21.0),
    )  # fmt: skip
    root = ElementTree.fromstring(chart)
    assert len([own for own in root.iter() if own.tag == "circle"]) == 3
    circles = [(float(own.attrib["cx"]), float(own.attrib["cy"])) for own in root.iter() if own.tag == "circle"]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in circles)
    assert circles[0][1] < circles[1][1] < circles[2][1]  # fewer errors are lower
    (path,) = [own.attrib["d"] for own in root.iter() if own.tag == "path" and "H" in own.attrib["d"]]
    assert re.fullmatch(r"M[\d. ]+(H[\d.]+V[\d.]+){2}", path)
    flat = ElementTree.fromstring(line_chart([Series("one", [(0.0, 0.0)])], "x", "y"))
    assert len(list(flat.iter("circle"))) == 1
    below = ElementTree.fromstring(line_chart([Series("log", [(0.0, -5.0), (1.0, 0.0)])], "x", "y"))
    assert [float(own.attrib["cy"]) < HEIGHT for own in below.iter("circle")] == [True, True]


@pytest.mark.parametrize("points", [[], [(0.0, float("nan"))], [(float("inf"), 0.0)]])
def test_charts_of_nothing_are_refused(points: list) -> None:
    with pytest.raises(InvalidArgumentError, match="a chart needs"):
        line_chart([Series("x", points)], "x", "y")


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 31.5) == [0.0, 10.0, 20.0, 30.0]
    assert ticks(-15, 0) == [-15.0, -10.0, -5.0, 0.0]
    assert ticks(3, 3) == [3]


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        write_page(tmp_path / "nowhere" / "p.html", "x")
    write_page(tmp_path / "p.html", "x")
    assert (tmp_path / "p.html").read_text() == "x"
