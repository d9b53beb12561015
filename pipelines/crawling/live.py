"""What a crawl shows while it runs: a table that is drawn anew where people look on, else a line each half minute."""

import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pbe_core.progress import LINE_SECONDS, Beat
from pbe_core.words import duration, number_of
from schemas.outcomes import OK, OUTCOMES

_WINDOW_SECONDS = 15.0
_HOSTS_SHOWN = 8


class Display:
    """Rate, MB/s, photos in flight, outcomes, hosts and the time that is left. A context manager."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.total = total
        self.console = console or Console(file=sys.stderr)
        self.points: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])
        self.codes: Mapping[str, int] = {}
        self.in_flight = 0
        self.hosts: Mapping[str, Any] = {}
        self.status = ""
        self.live = Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        self.lines = Beat(LINE_SECONDS, self._print_line)

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        else:
            self.lines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
        else:
            self.lines.__exit__()

    def say(self, status: str) -> None:
        """What holds the crawl up, shown until something else is said."""
        if status != self.status:
            self.status = status
            self._draw()

    def show(self, codes: Mapping[str, int], received: int, in_flight: int, hosts: Mapping[str, Any]) -> None:
        """Show the state of the crawl.

        Args:
            codes: photos by outcome, in this run.
            received: bytes that came over networks.
            in_flight: photos being asked for or looked at right now.
            hosts: `HostLedger.snapshot()`.
        """
        now = time.monotonic()
        done = sum(codes.values())
        if done < self.points[-1][1]:  # The ledger was started again, and knows of less.
            self.points = deque([(now, done, received)])
        else:
            self.points.append((now, done, received))
        while len(self.points) > 2 and self.points[1][0] < now - _WINDOW_SECONDS:
            self.points.popleft()
        self.codes, self.in_flight, self.hosts = codes, in_flight, hosts
        self._draw()

    def line(self) -> Text:
        """Everything but the hosts, in one line."""
        (start, done_then, bytes_then), (now, done, received) = self.points[0], self.points[-1]
        seconds = max(now - start, 1e-9)
        rate, speed = (done - done_then) / seconds, (received - bytes_then) / seconds
        left = f"{duration((self.total - done) / rate)} left" if rate and done < self.total else ""
        outcomes = Counter({code: count for code, count in self.codes.items() if code != OK})
        parts = [
            f"crawling {done:,} of {number_of(self.total, 'photo')}",
            f"{rate:,.0f}/s",
            f"{speed / 1e6:,.1f} MB/s",
            f"{self.in_flight} in flight",
            f"ok {self.codes.get(OK, 0):,}",
            *(f"{code} {count:,}" for code, count in outcomes.most_common()),
            *filter(None, [left, self.status]),
        ]
        return Text(" · ".join(parts))

    def _draw(self) -> None:
        if self.live:
            bar = ProgressBar(total=max(1, self.total), completed=self.points[-1][1])
            self.live.update(Group(self.line(), bar, _host_table(self.hosts)))

    def _print_line(self) -> None:
        self.console.print(self.line(), soft_wrap=True, highlight=False)


def summary_table(counts: Mapping[str, int]) -> Table:
    """Where every wanted photo went; "" are those of which nothing is recorded yet."""
    table = Table(title="What became of the wanted photos", title_justify="left")
    table.add_column("outcome")
    table.add_column("photos", justify="right")
    table.add_column("may come later")
    table.add_column("meaning")
    total = sum(counts.values())
    table.add_row("wanted", f"{total:,}", "", "")
    table.add_section()
    for code, count in counts.items():
        if code:
            outcome = OUTCOMES[code]
            table.add_row(code, f"{count:,}", "yes" if outcome.transient else "", outcome.meaning)
        else:
            table.add_row("not asked for yet", f"{count:,}", "yes", "nothing is recorded: the same command goes on")
    return table


def _host_table(hosts: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("host", "in flight", "waiting", "answered", "failed", "state"):
        table.add_column(name, justify="left" if name in ("host", "state") else "right")
    ranked = sorted(hosts.items(), key=lambda item: (-item[1].in_flight, -item[1].waiting, item[0]))
    for host, state in ranked[:_HOSTS_SHOWN]:
        numbers = [f"{number:,}" for number in (state.in_flight, state.waiting, state.successes, state.failures)]
        table.add_row(host, *numbers, state.state)
    if len(ranked) > _HOSTS_SHOWN:
        table.add_row(f"and {number_of(len(ranked) - _HOSTS_SHOWN, 'more host')}", "", "", "", "", "")
    return table
