"""Progress of long work on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of `total` steps; call the yielded function after each step with what to show beside it.

    Where the output is no terminal (a job's log), a line is printed about every tenth of the way instead.
    """
    if not console.is_terminal:
        done = 0

        def line(shown: str = "") -> None:
            nonlocal done
            done += 1
            if done == total or done * 10 // total > (done - 1) * 10 // total:
                console.print(f"{name} {done}/{total}  {shown}", soft_wrap=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, shown="")

        def advance(shown: str = "") -> None:
            progress.update(task, advance=1, shown=shown)

        yield advance
