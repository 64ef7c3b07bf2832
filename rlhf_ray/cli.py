"""rlhf-ray STAGE [hydra overrides]: compose, check, and only then import the one stage that runs.

Exit status: 0 done; 1 failed (with a post-mortem or a traceback; or, from doctor, something needed is missing); 2 the
user can fix it (one line on stderr for each problem); 130 Ctrl-C; 143 SIGTERM. After the last two the same command goes
on from the checkpoint that was saved. `submit` hands back the exit status of its job.
"""

import argparse
import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from threading import Thread
from typing import NoReturn

from rlhf_ray.cluster.interruption import terminate, terminated
from rlhf_ray.config.checks import check_model, stages_of, validate
from rlhf_ray.config.load import compose, conf_dir, to_yaml
from rlhf_ray.errors import RunFailed, UserError

STAGES = {
    "pretrain": "train a base model on plain text",
    "sft": "supervised fine-tuning on demonstrations",
    "compare": "sample K responses per prompt from the SFT policy and have them ranked",
    "rm": "train the reward model on the rankings",
    "ppo": "train the policy against the reward model",
    "dpo": "train the policy on the rankings directly (DPO); instead of rm and ppo",
    "eval": "compare the policy with SFT and base; report.json and report.html",
    "pipeline": "all stages of the recipe in order, skipping what is done and unchanged",
    "submit": "run a stage, or the pipeline, as a job of a running Ray cluster, and follow it",
    "export": "write a stage's model, or a checkpoint of ppo, as a Hugging Face directory with a model card",
    "scale": "more or fewer generators for a ppo stage that is under way",
    "watch": "a live view of a run in the terminal: `watch RUN`, its output_dir, or `watch job:SUBMISSION_ID`",
    "doctor": "what this machine has and lacks, and what to do about it",
}
EXAMPLES = """\
examples:
  rlhf-ray pipeline                                     the quickstart, on CPU
  rlhf-ray ppo algorithm.kl_coef=0.05 ppo.iterations=20 one stage of it, with overrides
  rlhf-ray ppo --cfg job                                print every option with its value; run nothing
  rlhf-ray pipeline experiment=hf_8gpu data.demonstrations=demos.jsonl ...
  rlhf-ray sft experiment=null data=files data.demonstrations=demos.jsonl model.path=DIR
  rlhf-ray submit pipeline -m seed=1,2,3                a job each on the Ray cluster of this machine"""
SUBMIT_OPTIONS = """\
  --address URL     the dashboard of the cluster, also for `watch job:ID` (RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)
  --no-wait         do not follow the job
  -m, --multirun    a job for each choice of KEY=A,B,C, in a directory of its own below output_dir"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `rlhf-ray --help` shows how")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see the module's docstring."""
    try:
        return _command(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        # Ray wraps what an actor raised, so that the text of the wrapper is a traceback; the cause is the line we want.
        cause = getattr(error, "cause", None)
        for line in str(cause if isinstance(cause, UserError) else error).splitlines():
            print(f"rlhf-ray: error: {line}", file=sys.stderr)
        return 2
    except RunFailed as failed:
        print(f"rlhf-ray: failed; {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rlhf-ray: interrupted", file=sys.stderr)
        return 130
    except SystemExit:
        if not terminated():
            raise
        print("rlhf-ray: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM


def _command(argv: list[str]) -> int:
    parser = _Parser(prog="rlhf-ray", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR")
    parser.add_argument("--address")
    parser.add_argument("--no-wait", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    args, rest = parser.parse_known_args(argv)  # so that options may stand before, between or after the overrides
    options = [word for word in rest if word.startswith("-")]
    if options:
        raise UserError(f"unknown option {options[0]}; `rlhf-ray --help` lists the options")
    if args.version:
        from rlhf_ray.versions import find

        print(f"rlhf-ray {find('rlhf-ray') or '(not installed, run from a checkout)'}")
        return 0
    stage, overrides = (rest[0], rest[1:]) if rest else (None, [])
    if stage is not None and stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, n=1)
        raise UserError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}"
                        + (f"; did you mean {near[0]}?" if near else ""))
    watched = overrides.pop(0) if stage == "watch" and overrides and "=" not in overrides[0] else None
    job = watched.removeprefix("job:") if watched and watched.startswith("job:") else None
    for option in ("address", "no_wait", "multirun"):
        if getattr(args, option) and stage != "submit" and not (option == "address" and job):
            raise UserError(f"--{option.replace('_', '-')} is an option of `rlhf-ray submit`"
                            + (" and `rlhf-ray watch job:SUBMISSION_ID`" if option == "address" else ""))
    if args.help or stage is None:
        print(_help(stage), file=sys.stdout if args.help else sys.stderr)
        return 0 if args.help else 2
    if job:
        from rlhf_ray.stages.watch import run_job

        run_job(job, args.address)
        return 0
    if args.cfg:
        print(to_yaml(compose(overrides[stage == "submit":], args.config_dir)), end="")
        return 0
    if stage == "submit":
        from rlhf_ray.stages.submit import submit

        signal.signal(signal.SIGTERM, terminate)
        return submit(overrides, args.config_dir, args.address, args.multirun, not args.no_wait)
    cfg = compose(overrides, args.config_dir)
    cfg.output_dir = watched or cfg.output_dir
    validate(cfg, stage)
    check_model(cfg, stage)
    if stages_of(cfg, stage):
        from rlhf_ray.data.sources import check_paths

        for name in stages_of(cfg, stage):
            check_paths(cfg.data, name)
    if cfg.logging.wandb == "online" and set(stages_of(cfg, stage)) - {"compare"}:
        from rlhf_ray.metrics.wandb_run import check_online

        check_online()
    signal.signal(signal.SIGTERM, terminate)
    module = f"rlhf_ray.stages.{stage}"
    if not stages_of(cfg, stage):
        importlib.import_module(module).run(cfg)
        return 0
    print(f"{stage}: output_dir={cfg.output_dir}", flush=True)
    if stage == "pipeline":  # which may have nothing to do
        importlib.import_module(module).run(cfg)
        return 0
    from rlhf_ray.cluster.runtime import session

    # PyTorch and transformers are seconds of imports, and Ray takes as many to start. Nothing else is imported
    # meanwhile (some packages are hidden from these imports), and no interpreter ends in the middle of them.
    imports = Thread(target=importlib.import_module, args=["rlhf_ray.models.hub"], daemon=True)
    imports.start()
    try:
        with session(cfg):
            imports.join()
            importlib.import_module(module).run(cfg)
    finally:
        imports.join()
    return 0


def _help(stage: str | None) -> str:
    words = {None: "STAGE", "submit": "submit [OPTIONS] STAGE"}.get(stage, stage)
    lines = [f"usage: rlhf-ray {words} [KEY=VALUE ...] [--cfg job] [--config-dir DIR]", ""]
    if stage:
        lines += [f"{stage}: {STAGES[stage]}", ""]
    else:
        lines += ["Align a language model: supervised fine-tuning, reward model, PPO, on Ray, vLLM and DeepSpeed.", ""]
        lines += ["stages:", *(f"  {name:<10} {text}" for name, text in STAGES.items()), ""]
    lines += ["experiments (experiment=NAME):"]
    for file in sorted((conf_dir() / "experiment").glob("*.yaml")):
        # The line under `# @package _global_` says what the recipe is.
        lines.append(f"  {file.stem:<12} {file.read_text(encoding='utf-8').splitlines()[1].lstrip('# ')}")
    lines += ["", *(["options of submit:", SUBMIT_OPTIONS, ""] if stage in (None, "submit", "watch") else []),
              "options:",
              "  --cfg job         print the composed configuration as YAML and stop",
              "  --config-dir DIR  more group options of your own: DIR/experiment/NAME.yaml; may be repeated",
              "  --version         print the version and stop",
              "  -h, --help        with a stage: about that stage", "", EXAMPLES]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
