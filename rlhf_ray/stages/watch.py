"""A live view of a run in the terminal: nothing is started, nothing of the run is touched.

It is drawn from the run's files alone, or, where these cannot be reached, from what its Ray job tells of them.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf_ray.config.schema import STAGES, Config
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.overview import Holder, Overview, Policy, RunFiles, Sample, Stage, read_holder
from rlhf_ray.metrics.sparkline import apportion, sparkline
from rlhf_ray.stages.lock import LOCK
from rlhf_ray.storage import fetch, local_root, reading, shown, small, url_of

WIDTH, WIDEST = 80, 110  # columns: where the output is no terminal; at most
REFRESH_S, REMOTE_S = 1.0, 5.0  # how often it is drawn; how often a URL is asked
LOOK_S = 0.2  # how often to look whether a file has grown
ACTORS = 8  # how many are shown
_STATE = {"done": "green", "running": "bold cyan", "failed": "bold red", "killed": "bold red", "stopped": "yellow",
          "waiting": "dim"}
_PHASES = (("█", "cyan"), ("▓", "magenta"), ("▒", "yellow"), ("░", "green"), ("▚", "blue"), ("▞", "red"), ("─", "dim"))
# (key, label with its unit, format)
_ROWS = (
    ("score", "score", ".2f"),
    ("judge_score", "judge score", ".2f"),
    ("kl_per_sequence", "KL, nats", ".2f"),
    ("entropy", "entropy, nats", ".2f"),
    ("response_length", "length, tokens", ".0f"),
    ("mismatch", "mismatch, nats", ".1e"),
)


def run(cfg: Config) -> None:
    """Show the run in output_dir: until Ctrl-C in a terminal, else once."""
    copy = local_root(cfg.output_dir)
    ours = url_of(copy) and (by := read_holder(copy)) and by.alive  # nothing is newer than what the driver here has
    with nullcontext(copy) if ours else reading(cfg.output_dir) as directory:
        files = RunFiles(directory)
        try:
            require_run(files)
            show(files.read if ours else fetching(files), files.sizes)
        except OSError as error:
            raise UserError(f"output_dir={cfg.output_dir}: cannot read {error.filename}: {error.strerror}") from error


def fetching(files: RunFiles) -> Callable[[float], Overview]:
    """`files.read`; where they are a copy of a URL, of what is there now, or was a few seconds ago."""
    fetched = -REMOTE_S

    def read(now: float) -> Overview:
        nonlocal fetched
        if time.monotonic() - fetched >= REMOTE_S:
            fetch(files.directory, small)
            fetch(files.directory / LOCK)
            fetched = time.monotonic()
        return files.read(now)

    return read


def run_job(submission_id: str, address: str | None) -> None:
    """The same of a run on any machine, from what its Ray job tells. address: of the dashboard (None: where `ray job`
    looks)."""
    from rlhf_ray.cluster.job import Job  # they import ray
    from rlhf_ray.cluster.submission import find_address

    show(Job(submission_id, find_address(address)).read, list)


def show(read: Callable[[float], Overview], sizes: Callable[[], list[int]]) -> None:
    """read: the overview at a time, unix seconds; sizes: what changes when there is something new."""
    console = Console(highlight=False)
    if console.is_interactive and sys.stdout.isatty():
        follow(read, sizes, console)
    else:
        page = Console(width=WIDTH, force_terminal=False, color_system=None, highlight=False)
        page.print(view(read(time.time()), WIDTH))


def require_run(files: RunFiles) -> None:
    """Raise UserError where no run has begun."""
    if files.exist():
        return
    given = files.directory
    if not given.is_dir():
        found = "no such directory"
    elif given.absolute().name in STAGES and RunFiles(given.absolute().parent).exist():
        found = f"that is one stage of a run, give output_dir={given.parent}"
    else:
        found = "no run has begun there"
    raise UserError(f"output_dir={shown(given)}: {found}; expected the output_dir of a run, with STAGE/config.yaml for "
                    "each stage that has begun (sft, rm, ppo, ...)")


def follow(read: Callable[[float], Overview], sizes: Callable[[], list[int]], console: Console) -> None:
    """Until Ctrl-C: a new picture every second, and as soon as a file has grown."""
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            width, before = min(console.width, WIDEST), sizes()
            live.update(Group(view(read(time.time()), width),
                              Text("Ctrl-C ends this view, not the run", style="dim")), refresh=True)
            until = time.monotonic() + REFRESH_S
            while time.monotonic() < until and sizes() == before:
                time.sleep(LOOK_S)


def view(overview: Overview, width: int) -> RenderableType:
    """The whole picture, `width` columns wide at most. What is urgent comes first."""
    ppo = next((stage for stage in overview.stages if stage.name == "ppo"), None)
    parts: list[RenderableType] = [_line(f"run {shown(overview.directory)}", "bold")]
    if overview.heard:
        parts.append(_line(overview.heard, "dim"))
    if overview.holder or not overview.heard:
        parts.append(_holder(overview.holder))
    if overview.policy and overview.policy.paused is not None:
        lives = overview.holder and overview.holder.alive is not False
        how = f"remove {overview.directory / 'ppo/PAUSED'} to go on" if lives else "the same command goes on"
        parts.append(Text(f"PAUSED after {overview.policy.paused}; {how}", style="bold yellow"))
    parts += [Text(f"{s.name} failed: {s.why or 'it left no summary'} See {shown(s.post_mortems[-1])}", style="red")
              for s in overview.stages if s.state == "failed"]
    parts += ["", _stages(overview.stages, width), *(_line(n, "dim") for s in overview.stages for n in _notes(s))]
    if ppo and overview.policy:
        parts += ["", *_policy(ppo, overview.policy, width)]
    return Constrain(Group(*parts), width)


def _line(text: str, style: str = "") -> Text:
    """One line, cut where it is too long."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _holder(by: Holder | None) -> Text:
    if by is None:
        return _line("nobody is running it now", "dim")
    where = f"process {by.pid} on {by.host} since {by.since}: {by.command}"
    if by.alive is False:
        return _line(f"killed: {where}", "red")
    return _line(where if by.alive else f"if it has not been killed (another host): {where}", "dim")


# --- the stages ---


def _stages(stages: Sequence[Stage], width: int) -> Table:
    """A row for each stage; loss and accuracy of those that learn from examples."""
    spark = max(4, (width - 54) // 2)
    table = Table.grid(padding=(0, 1))
    for column in range(8):
        table.add_column(no_wrap=True, justify="right" if column in (2, 3, 4, 6) else "left")
    table.add_row(*(Text(word, style="dim") for word in ("stage", "state", "time", "step", "loss", "", "accuracy")))
    for s in stages:
        cells = [Text(s.name), Text(s.state, style=_STATE[s.state]), Text(duration(s.seconds)),
                 Text(str(s.step) if s.step else "")]
        for key, form in (("loss", ".3f"), ("accuracy", ".2f")):
            values = s.series.get(key, [])
            seen = any(v is not None for v in values)
            cells += [Text(_number(values[-1], form) if seen else ""),
                      Text(sparkline(values, spark) if seen else "", style="cyan")]
        table.add_row(*cells)
    return table


def _notes(s: Stage) -> Iterator[str]:
    """Where a stage would go on from, when it was last heard of, and how it failed before."""
    facts = [f"newest checkpoint step {s.saved.step}, {duration(s.saved.age_s)} ago"] if s.saved else []
    if s.state == "running" and s.age_s is not None:
        facts.append(f"last heard of {duration(s.age_s)} ago")
    elif s.state in ("failed", "killed", "stopped"):
        facts.append("the same command goes on")
    if facts:
        yield f"{s.name}: {'; '.join(facts)}"
    if s.post_mortems and s.state != "failed":
        yield f"{s.name}: {len(s.post_mortems)} earlier post-mortem{'s'[:len(s.post_mortems) > 1]}, newest " \
              f"{shown(s.post_mortems[-1])}"


# --- ppo ---


def _policy(stage: Stage, p: Policy, width: int) -> Iterator[RenderableType]:
    words = [f"ppo  iteration {stage.step}" + (f" of {p.total}" if p.total else "")]
    words += [f"{p.step_s:.1f} s each"] if p.step_s is not None else []
    words += [f"{duration(p.eta_s)} left"] if p.eta_s is not None else []
    yield _line(", ".join(words), "bold")
    yield _curves(stage, width)
    if p.phases:
        yield ""
        yield from _phases(p, width)
    if p.memory:
        yield _memory(p, width)
    replaced = "" if p.restarts is None else f"{p.restarts} actors replaced, "
    yield _line(f"{replaced}{p.rang} alarms" + (", the last:" if p.alarms else ""))
    for ring in p.alarms:
        text = f"{ring.name} in iteration {ring.iteration} ({ring.action}): {ring.message}"
        yield Text(text, style="red") if ring is p.alarms[-1] else _line(text, "red")
    if p.samples:
        yield ""
        yield _line(f"samples of iteration {p.samples[0].iteration}: score, prompt, response", "dim")
    for sample in p.samples:
        yield from _sample(sample, width)


def _sample(s: Sample, width: int) -> Iterator[Text]:
    """The end of the prompt in a line, the beginning of the response in two."""
    score, prompt, response = f"{_number(s.score, '.2f')}  ", plain(s.prompt), plain(s.response)
    room = width - len(score)
    yield _line(score + (prompt if len(prompt) <= room else "…" + prompt[1 - room :]), "dim")
    yield Text(response if len(response) <= 2 * width else response[: 2 * width - 1] + "…")


def _curves(stage: Stage, width: int) -> Table:
    """A row for each number that was ever there: its last value, the run so far, the range that this spans."""
    table = Table.grid(padding=(0, 2))
    for column in range(4):
        table.add_column(no_wrap=True, justify="right" if column == 1 else "left")
    for key, label, form in _ROWS:
        values = stage.series.get(key, [])
        finite = [v for v in values if v is not None]
        if finite:
            table.add_row(label, _number(values[-1], form), Text(sparkline(values, max(4, width - 50)), style="cyan"),
                          Text(f"{min(finite):{form}} to {max(finite):{form}}", style="dim"))
    return table


def _phases(p: Policy, width: int) -> Iterator[Text]:
    """Where the time of the last iterations went: one bar, then name and mean seconds of what can be seen of it."""
    bar, names = Text(no_wrap=True), []
    for i, (columns, (name, seconds)) in enumerate(zip(apportion(list(p.phases.values()), width), p.phases.items(),
                                                       strict=True)):
        mark, style = _PHASES[i % len(_PHASES)]
        bar.append(mark * columns, style)
        if columns:
            names.append(Text.assemble((mark, style), f" {name} {seconds:.1f} s"))
    yield bar
    yield _packed(names, width)


def _memory(p: Policy, width: int) -> Text:
    """All actors in sum, and those that grew most."""
    shown = sorted(p.memory, key=lambda a: -(a.growth or 0.0))[:ACTORS]
    names = [Text(f"memory {sum(a.gib for a in p.memory):.2f} GiB (growth since the warm-up):")]
    names += [Text(f"{a.name} {a.gib:.2f}" + (f" ({a.growth:+.0%})" if a.growth is not None else "")) for a in shown]
    if len(p.memory) > len(shown):
        names.append(Text(f"and {len(p.memory) - len(shown)} that grew less"))
    return _packed(names, width)


def _packed(items: Sequence[Text], width: int) -> Text:
    """Side by side, as many as a line holds; none is broken."""
    out, used = Text(), 0
    for item in items:
        gap = "" if not used else "  " if used + 2 + len(item) <= width else "\n"
        used = len(item) + (used + 2 if gap == "  " else 0)
        out.append(gap).append_text(item)
    return out


# --- words ---


def duration(seconds: float | None) -> str:
    """As `83s`, `12m 05s`, `3h 20m` or `2d 04h`; empty for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 100:
        return f"{whole}s"
    if whole < 6000:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 360000:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def plain(text: str) -> str:
    """In one line, without what would move the cursor or change colours."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
