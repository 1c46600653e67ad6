"""Progress bars for the commands that read or write large files."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from server.cli.terminal.text import escape
from weights.progress import Advance


def make_progress(transient: bool = False) -> Progress:
    """Bars on standard error, in bytes. Names are printed as they are, never as rich's markup."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=transient)


class ProgressBars:
    """A `ProgressReporter` that shows a bar for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, description: str, size: int) -> Advance:
        bar = self._progress.add_task(escape(description), total=size)
        return lambda count: self._progress.advance(bar, count)
