"""The one look of all tables."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


class HeadedTable(Table):
    """A table under a heading of its own width: rich wraps a title to the width of the table."""

    heading: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the heading, then the table."""
        if self.heading:
            yield Text(self.heading, style="bold")
        yield from super().__rich_console__(console, options)


def new_table(heading: str = "", *, header: bool = True) -> Table:
    """Return an empty table: heading at the left, a line under the header, none elsewhere."""
    table = HeadedTable(box=SIMPLE_HEAD, show_header=header, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.heading = heading
    return table
