"""Timelines as text, SVG, HTML and traces: everything that happens is shown, where it happens."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from hypothesis import given

from quintet.plan.costs import Costs
from quintet.plan.draw import html, seconds, svg, terminal
from quintet.plan.simulate import simulate
from quintet.plan.trace import chrome
from quintet.schedule import Schedule, build
from tests.schedule.schedules import schedules

SVG = "{http://www.w3.org/2000/svg}"


def test_a_terminal_timeline_that_a_reader_can_follow() -> None:
    # 1F1B on two ranks with F = 1 and B = 2, one letter per tick.
    timeline = simulate(build("1f1b", 2, 3), Costs()).timeline
    lines = terminal(timeline, width=len("rank 0 ") + 12).plain.splitlines()
    assert lines[0] == "rank 0 FF··BBFBB·BB"
    assert lines[1] == "rank 1 ·FBBFBBFBB··"
    assert "F forward  B backward  · idle   one letter is 1 s" in lines[2]


@given(schedule=schedules(most_ranks=5, most_microbatches=8))
def test_a_picture_has_a_bar_for_every_work(schedule: Schedule) -> None:
    root = ElementTree.fromstring(svg(simulate(schedule, Costs(pair=0.8)).timeline))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert [str(title).split(":")[0] for title in titles] == [str(work) for row in schedule.table for work in row]
    width = float(root.attrib["width"])
    for box in root.iter(f"{SVG}rect"):
        assert 0 <= float(box.attrib.get("x", 0)) <= float(box.attrib.get("x", 0)) + float(box.attrib["width"]) <= width


def test_a_page_tells_activations_or_where_they_are_known_bytes() -> None:
    assert "activations 2<" in html([simulate(build("1f1b", 2, 4), Costs())])
    assert "memory 5 GiB<" in html([simulate(build("1f1b", 2, 4), Costs(weight_bytes=3 * 2.0**30, activation_bytes=2.0**30))])


def test_a_page_shows_every_schedule_on_one_scale() -> None:
    found = [simulate(build(name, 2, 4), Costs()) for name in ("gpipe", "zb1p")]
    page = html(found)
    assert page.count("<svg") == 2
    assert "step 15 s, bubble 20.0%, activations 4" in page
    assert "step 13 s, bubble 7.7%, activations 2" in page


@given(schedule=schedules(most_ranks=5, most_microbatches=8))
def test_a_trace_has_every_work_and_every_message(schedule: Schedule) -> None:
    timeline = simulate(schedule, Costs(p2p_latency=0.25)).timeline
    events = json.loads(chrome({schedule.name: timeline}))["traceEvents"]
    works = [(event["tid"], event["name"], event["ts"]) for event in events if event["ph"] == "X"]
    assert works == [
        (rank, str(work), start * 1e6)
        for rank, row in enumerate(schedule.table)
        for work, start in zip(row, timeline.starts[rank], strict=True)
    ]
    sent = {event["id"]: event for event in events if event["ph"] == "s"}
    received = {event["id"]: event for event in events if event["ph"] == "f"}
    assert sent.keys() == received.keys()
    assert all(received[i]["ts"] >= sent[i]["ts"] + 0.25e6 - 1e-3 and received[i]["tid"] != sent[i]["tid"] for i in sent)
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {schedule.name} | {f"rank {rank}" for rank in range(schedule.num_ranks)}


def test_times_have_three_digits() -> None:
    assert [seconds(t) for t in (0.0, 2e-9, 3.14159e-6, 0.0576, 19.926)] == ["0 s", "2 ns", "3.14 µs", "57.6 ms", "19.9 s"]
