"""The page of a comparison: self-contained, whole, and safe whatever the names in it are."""

import json
import re
from html.parser import HTMLParser

import msgspec
import pytest
from records import dumped, measurement_of
from small_plans import plan

from planner.cli import frame
from planner.compare import compare
from planner.cost.figures import Figure, scaled
from planner.machine import load_machine
from planner.model import with_sizes
from planner.predict import predict
from planner.report import page
from planner.report.page import comparison_page
from planner.report.phases import PHASES

MACHINE = load_machine("cpu-generic")
PLAN = plan(with_sizes(layers=2, hidden=64, heads=4, seq_len=32), pp=2, dp=2, batch=8, micro=2)
PREDICTED = predict(PLAN, MACHINE)
MEASURED = measurement_of(PLAN, scaled(MACHINE, Figure("curve", ("default",)), 2.0))


class _Reader(HTMLParser):
    """Elements in order, and that those that must be closed are."""

    EMPTY = ("meta", "br", "input", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.scripts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def _read(text):
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def text():
    return comparison_page(compare(PREDICTED, MEASURED), PREDICTED, MEASURED)


def test_the_page_loads_nothing(text):
    reader = _read(text)
    assert not [name for name, attributes in reader.elements if {"src", "href"} & attributes.keys()]
    assert "link" not in {name for name, _ in reader.elements}
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)


def test_the_data_are_both_traces(text):
    data = json.loads(_read(text).scripts[0])
    assert [phase["name"] for phase in data["phases"]] == [phase.name for phase in PHASES]
    for found, record in zip(data["records"], (PREDICTED, MEASURED), strict=True):
        assert found["step"] == record.step_seconds
        assert found["leftOut"] == 0
        assert len(found["spans"]) == len(record.trace)
        rows = sorted(
            (found["lanes"][lane]["rank"], found["lanes"][lane]["stream"], found["keys"][key], bool(waits))
            for lane, _, _, _, key, waits in found["spans"]
        )
        assert rows == sorted((row[0], row[1], row[2], row[5] == "wait") for row in record.trace)
        for lane in range(len(found["lanes"])):
            starts = [span[1] for span in found["spans"] if span[0] == lane]
            assert starts == sorted(starts)  # what the page's binary search relies on


def test_the_tables_hold_every_contribution(text):
    comparison = compare(PREDICTED, MEASURED)
    for term in comparison.contributions:
        assert (f"{term.cause}: {term.name}" in text) == bool(term.predicted_seconds or term.measured_seconds)
    assert text.index("<h2>Timelines") < text.index('<canvas id="timeline"') < text.index("made of</h2>")


def test_names_cannot_leave_their_place():
    nasty = "</script><script>alert(1)</script><!--"
    note = msgspec.structs.replace(PREDICTED.machine, name=nasty)
    record = msgspec.structs.replace(PREDICTED, machine=note)
    reader = _read(comparison_page(compare(record, MEASURED), record, MEASURED))
    assert len(reader.scripts) == 2
    assert nasty in json.loads(reader.scripts[0])["records"][0]["name"]


def test_long_traces_lose_their_shortest_spans_and_say_so(monkeypatch):
    monkeypatch.setattr(page, "MAX_SPANS", 50)
    data = json.loads(_read(comparison_page(compare(PREDICTED, MEASURED), PREDICTED, MEASURED)).scripts[0])
    for found, record in zip(data["records"], (PREDICTED, MEASURED), strict=True):
        assert len(found["spans"]) == 50
        assert found["leftOut"] == len(record.trace) - 50
        shortest = min(span[2] - span[1] for span in found["spans"])
        assert sum(row[4] - row[3] > shortest + 1e-8 for row in record.trace) <= 50


def test_the_command_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dumped(PREDICTED, tmp_path / "predicted.json")
    dumped(MEASURED, tmp_path / "measured.json")
    # The measurement may be named first: it is drawn below all the same.
    assert frame.run(["compare", "measured.json", "predicted.json", "--html", "page.html"]) == 0
    assert "wrote page.html" in capsys.readouterr().err
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(_read(written).scripts[0])
    assert [each["name"].split()[0] for each in data["records"]] == ["predicted", "measured"]
    assert frame.run(["compare", "measured.json", "predicted.json", "--html", "no/such/page.html"]) == 2
