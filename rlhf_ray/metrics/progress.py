"""Progress of long work on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar of `total` steps; call the yielded function with how many are done and what to show beside it.

    Where the output is no terminal (a job's log), a line is printed about every tenth of the way instead.
    """
    if not console.is_terminal:
        before = 0

        def line(done: int, shown: str = "") -> None:
            nonlocal before
            told, before = before, done
            if done == total or done * 10 // total != told * 10 // total:
                console.print(f"{name} {done}/{total}  {shown}", soft_wrap=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, shown="")

        def advance(done: int, shown: str = "") -> None:
            progress.update(task, completed=done, shown=shown)

        yield advance
