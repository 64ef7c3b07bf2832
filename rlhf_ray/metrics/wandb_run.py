"""wandb: configuration, metrics, samples, the report and the policy; offline unless asked otherwise.

Offline it has a process of its own beside the driver, writes into `<stage>/wandb` and reaches nobody; `wandb sync`
sends it later. wandb is imported only where it is not disabled.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.core.types import SampleText
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.storage import run_name

TABLES = 20  # of samples, in a run of any length: each is a few files
ROWS = 60  # of a table
FINISH_S = 600.0  # for what is still to be sent at the end; `wandb sync` sends the rest
_COLUMNS = ("iteration", "score", "prompt", "response", "tokens", "truncated")
_PLACES = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")  # environment: where wandb keeps files besides its own directory
_ours: set[str] = set()  # those of _PLACES that the user has not set


def check_online() -> None:
    """Raise UserError, with what to do, unless there is an API key that the server takes; 10 s if nobody answers.

    wandb's own check of a key starts its process, and waits for it longer than anybody would.
    """
    import httpx

    errors = _wandb(None).errors
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    url = wandb_setup.singleton().settings.base_url
    otherwise = "or take logging.wandb=offline and send the run later, with `wandb sync`"
    try:
        found = wbauth.authenticate_session(host=url, source="rlhf-ray", prompt=False)
    except errors.Error as error:
        raise UserError(f"logging.wandb=online: {_line(error)}; mend that, {otherwise}") from error
    if found is None:
        raise UserError(f"logging.wandb=online: no API key for {url}: run `wandb login` or set WANDB_API_KEY, "
                        f"{otherwise}")
    if not isinstance(found, wbauth.AuthApiKey):
        return
    try:
        answer = httpx.post(f"{url}/graphql", auth=("api", found.api_key), json={"query": "query { viewer { id } }"},
                            timeout=10)
        taken = answer.status_code == 200 and (answer.json().get("data") or {}).get("viewer")
    except (httpx.HTTPError, ValueError) as error:
        raise UserError(f"logging.wandb=online: {url}: {_line(error)}; look at WANDB_BASE_URL and the network, "
                        f"{otherwise}") from error
    if not taken:
        raise UserError(f"logging.wandb=online: {url} does not take the API key: run `wandb login --relogin` or set "
                        f"WANDB_API_KEY, {otherwise}")


class WandbRun:
    """One run there, of one stage: `a/seed=1/ppo`. What goes wrong is said once, and then nothing more is logged; only
    an online one that cannot begin raises UserError.

    run_dir: `<output_dir>/<stage>`, where the file `wandb_id` keeps its id. mode: offline or online. goes_on: whether
    it is the run of that id; else a new one. total: iterations, None if not known.
    """

    def __init__(
        self, run_dir: Path, mode: str, project: str, config: Mapping[str, Any], goes_on: bool, total: int | None
    ) -> None:
        self._every = math.ceil((total or 1) / TABLES)
        self._rows: list[list[Any]] = []
        self._run: Any = None
        run, kept = run_name(run_dir.parent), run_dir / "wandb_id"
        if not (goes_on and kept.is_file()):
            kept.write_text(uuid.uuid4().hex[:8])
        try:
            wandb = _wandb(run_dir)
            settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False,
                                      x_disable_stats=True, x_disable_machine_info=True, finish_timeout=FINISH_S,
                                      finish_timeout_raises=True)
            self._run = wandb.init(project=project, mode=mode, dir=str(run_dir), config=dict(config),
                                   name=f"{run}/{run_dir.name}", group=run, id=kept.read_text(), resume="allow",
                                   settings=settings)
        except Exception as error:
            if mode == "online":
                raise UserError(f"logging.wandb=online: {_line(error)}; or take logging.wandb=offline") from error
            console.print(f"wandb: {_line(error)}; nothing is logged there", markup=False)

    def log(self, iteration: int, values: Mapping[str, Any], samples: Sequence[SampleText]) -> None:
        """One iteration. An iteration that is done again, after learners were lost, keeps its first numbers."""
        self._rows = [row for row in self._rows if row[0] < iteration][len(samples) - ROWS :]
        self._rows += [[iteration, s.score, s.prompt, s.response, s.tokens, s.truncated] for s in samples]
        table = self._table() if self._rows and iteration % self._every == 0 else {}
        self._attempt(lambda: self._run.log({**values, **table}, step=iteration))

    def report(self, page: Path, numbers: Mapping[str, Any]) -> None:
        """The report as people see it, and its numbers in the summary."""
        def send() -> None:
            import wandb

            self._run.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
            self._run.summary.update({"report_numbers": dict(numbers)})

        self._attempt(send)

    def model(self, directory: Path) -> None:
        """A model as an artifact. Its files are not copied."""
        def send() -> None:
            import wandb

            storage.fetch(directory)
            artifact = wandb.Artifact(f"policy-{self._run.id}", type="model")
            for file in sorted(path for path in directory.iterdir() if path.is_file()):
                artifact.add_file(str(file), skip_cache=True, policy="immutable")
            self._run.log_artifact(artifact)

        self._attempt(send)

    def close(self) -> None:
        """Finish; a second call does nothing. Online it waits until all is sent, FINISH_S at most."""
        if self._rows:
            self._attempt(lambda: self._run.log(self._table()))
        self._attempt(lambda: self._run.finish())
        self._leave()

    def _table(self) -> dict[str, Any]:
        import wandb

        rows, self._rows = self._rows, []
        return {"samples": wandb.Table(columns=list(_COLUMNS), data=rows)}

    def _attempt(self, call: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # whatever it is, it is not worth a run
            self._leave()
            console.print(f"wandb: {_line(error)}; nothing more is logged there", markup=False)

    def _leave(self) -> None:
        """End wandb's process here, not when Python exits: whoever stops a job has ended it before that."""
        if self._run is not None:
            self._run = None
            with suppress(Exception):
                _wandb(None).teardown()


def _wandb(run_dir: Path | None) -> Any:
    """The library: it keeps its files in the run's directory, and calls nobody about its own errors."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if run_dir is not None:
        _ours.update(variable for variable in _PLACES if variable not in os.environ)
        os.environ.update(dict.fromkeys(_ours, str(run_dir / "wandb")))
    import wandb

    return wandb


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
