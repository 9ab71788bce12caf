"""The live view shows what matters, redraws seldom, and leaves the terminal as it was."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from quintet.monitor.live import Live
from quintet.monitor.metrics import Message
from tests.monitor.events import evaluated, record, saved


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def panel_text(live: Live, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width, record=True)
    console.print(live.panel())
    return console.export_text()


def test_the_panel_shows_the_newest_figures() -> None:
    clock = Clock()
    live = Live(Console(file=StringIO(), force_terminal=True, width=100), title="laptop", clock=clock)
    for step in range(1, 6):
        live.write(record(step))
    live.write(evaluated(5))
    live.write(saved(5))
    clock.now += 120
    text = panel_text(live)
    live.close()
    for figure in (
        "laptop · pretrain",
        "step 5/10",
        "50%",
        "2m 00s gone",
        "2.5s left",
        "3.5000",
        "smooth 3.",
        "█",
        "stdlib 4.2500   docs 5.5000   at step 5",
        "8.19K tokens/s   MFU 41.0%   20.5K tokens",
        "gradient norm 0.5   learning rate 0.003   batch 16",
        "load CV 0.364   worst overload 50%",
        "step 5   240 MiB in 0.8s   2m 00s ago",
        "1 GiB",
    ):
        assert figure in text


def test_before_the_first_step_the_panel_says_that_it_waits() -> None:
    assert "waiting for the first step" in panel_text(Live(Console(file=StringIO()), title="laptop"))


def test_the_panel_fits_a_narrow_terminal() -> None:
    live = Live(Console(file=StringIO(), force_terminal=True, width=40), title="laptop", clock=Clock())
    live.write(record(1))
    live.close()
    assert all(len(line) <= 40 for line in panel_text(live, width=40).splitlines())


def test_a_fast_run_redraws_only_a_few_times_a_second() -> None:
    clock, output = Clock(), StringIO()
    live = Live(Console(file=output, force_terminal=True, width=80), title="laptop", per_second=4, clock=clock)
    for step in range(1, 101):
        live.write(record(step, num_steps=100))
        clock.now += 0.01
    draws = output.getvalue().count("laptop")
    live.close()
    assert 3 <= draws <= 6


def test_messages_scroll_by_and_the_cursor_comes_back() -> None:
    output = StringIO()
    live = Live(Console(file=output, force_terminal=True, width=80), title="laptop", clock=Clock())
    live.write(record(1))
    live.write(Message(text="a [note]"))
    live.close()
    live.close()
    assert "a [note]" in output.getvalue()
    assert output.getvalue().rstrip().endswith("\x1b[?25h")


def test_steps_that_a_resumed_run_goes_over_again_count_once() -> None:
    live = Live(Console(file=StringIO(), width=100), title="laptop", clock=Clock())
    for step, loss in ((1, 1.0), (2, 9.0), (3, 9.0), (2, 1.0)):
        live.take(record(step, main_loss=loss), 0.0)
    assert "smooth 1.0000" in panel_text(live)
