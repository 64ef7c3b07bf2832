"""From overrides to a `Config`: groups, Hydra composition, and a configuration's description, YAML and fingerprint.

An override that is wrong ends in a `UserError` that names its key and says what to do; `rlhf_ray.config.checks` looks
at the values. Hydra is imported inside the functions that need it, so that `rlhf-ray --help` does not pay for it.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from itertools import product
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rlhf_ray.config.schema import MISSING, Config
from rlhf_ray.errors import UserError
from rlhf_ray.remote import check_url

ASSETS = "assets://"  # prefix of a model.path that comes with the package

# The limits that a field's metadata may set: how to check one, how to write it.
LIMITS = {"ge": (ge, ">="), "gt": (gt, ">"), "le": (le, "<="), "lt": (lt, "<")}


class Option(NamedTuple):
    """One documented key. `limits` is text such as `>= 0, < 1` or `a | b`, empty when there are none."""

    key: str
    type: str
    default: Any
    help: str
    limits: str


# --- composing ---


def conf_dir() -> Path:
    """The directory of Hydra groups: `conf/` of a checkout, `rlhf_ray/conf` of an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError("conf/config.yaml is missing beside the package: reinstall rlhf_ray")


def groups(extra_dirs: Sequence[str | Path] = ()) -> dict[str, list[str]]:
    """The options of each configuration group, sorted: `{"experiment": ["hf_8gpu", ...], ...}`."""
    found: dict[str, set[str]] = {}
    for root in (conf_dir(), *map(Path, extra_dirs)):
        for file in root.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}


def compose(overrides: Sequence[str], extra_dirs: Sequence[str | Path] = ()) -> Config:
    """The configuration that `conf/`, the schema and Hydra `overrides` make together; not yet validated.

    `extra_dirs` hold more group options (`DIR/experiment/mine.yaml`). Unset optional keys (`???`) become None, and
    `assets://NAME` in model.path the directory of that asset.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for directory in extra_dirs:
        if not Path(directory).is_dir():
            raise UserError(f"--config-dir {directory}: no such directory")
    for_hydra = _checked(overrides, groups(extra_dirs))
    if extra_dirs:
        search = ",".join(f"'file://{Path(directory).resolve()}'" for directory in extra_dirs)
        for_hydra.append(f"hydra.searchpath=[{search}]")
    ConfigStore.instance().store("base_config", Config)
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base=None):
            node = hydra_compose("config", for_hydra)
        tree = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_one_line(error)) from error
    cfg: Config = _build(Config, tree)
    if "://" in cfg.output_dir:
        check_url(cfg.output_dir)
    if cfg.model.path.startswith(ASSETS):
        cfg.model.path = asset_dir(cfg.model.path.removeprefix(ASSETS))
    elif cfg.model.path.startswith("~"):
        cfg.model.path = str(Path(cfg.model.path).expanduser())
    return cfg


def expand(overrides: Sequence[str]) -> list[tuple[list[str], str]]:
    """The runs of a sweep (`seed=1,2,3`): of each its overrides, and a name as Hydra makes it: `algorithm=ppo,seed=1`.

    One run with an empty name where nothing is swept. Raises UserError for what is no override, or no finite choice.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, choices = OverridesParser.create(), list[list[str]]()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
            swept = [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()] \
                if parsed.is_sweep_override() else [text]
        except (HydraException, AssertionError) as error:
            raise UserError(f"override {text!r} is neither KEY=VALUE nor a finite choice, KEY=A,B,C, in Hydra's "
                            "syntax") from error
        choices.append(swept)
    return [(list(run), ",".join(sorted(text for text, values in zip(run, choices, strict=True) if len(values) > 1)))
            for run in product(*choices)]


def asset_dir(name: str) -> str:
    """Where `assets://NAME` is: a directory of the package."""
    return str(Path(__file__).resolve().parents[1] / "assets" / name)


def _build(kind: Any, tree: Any) -> Any:
    values = {}
    for f in fields(kind):
        value = tree[f.name]
        optional = type(None) in get_args(f.type)
        values[f.name] = (
            _build(f.type, value) if is_dataclass(f.type) else None if optional and value == MISSING else value
        )
    return kind(**values)


def _checked(overrides: Sequence[str], options: dict[str, list[str]]) -> list[str]:
    """The overrides as Hydra takes them, after everything about them that we can say better than its own errors."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    keys = {option.key for option in describe()}
    sections = {key.rsplit(".", n)[0] for key in keys for n in range(1, key.count(".") + 1)}
    for_hydra = []
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            raise UserError(f"override {text!r} is not KEY=VALUE in Hydra's syntax; put a value with special "
                            "characters in quotes: 'KEY=\"VALUE\"'") from error
        key = parsed.key_or_group
        if parsed.is_sweep_override():
            raise UserError(f"override {text!r} has several values, but one run takes one; for a list write "
                            f"{key}=[a,b], for a job each `rlhf-ray submit -m`")
        if key in options:
            value = parsed.value()
            if value is None and not parsed.is_delete():
                text = f"~{key}"  # GROUP=null reads better than Hydra's way to leave a group out
            elif value is not None and value not in options[key]:
                raise UserError(f"{key}={value}: no such {key}; there are {', '.join(options[key])}"
                                + did_you_mean(str(value), options[key]))
        elif key not in keys | sections:
            raise UserError(_unknown(key))
        elif parsed.is_delete():
            raise UserError(f"override {text!r}: an option cannot be removed; leave the override out, or set "
                            f"{key}=null where null is allowed")
        for_hydra.append(text)
    return for_hydra


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown word: its nearest neighbour, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown(key: str) -> str:
    known = [option.key for option in describe()]
    # A right name in the wrong section (`lr` for `sft.optimizer.lr`) is as common as a misspelt one.
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(key, same_name, n=4, cutoff=0) or difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "`rlhf-ray ppo --cfg job` prints every key"
    return f"unknown key {key!r}; {hint}"


def _one_line(error: BaseException) -> str:
    """What a Hydra or OmegaConf error is about, in one line: the file of a group option, if it is one, and the key."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    where = next((found[0] for e in chain if (found := re.match(r"In '[^']+': ", str(e)))), "")
    named = [e for e in chain if getattr(e, "full_key", None)]
    if not named:
        while error.__cause__ is not None:
            error = error.__cause__
        return f"configuration: {_flat(error)}"
    key, text = named[0].full_key, _flat(named[0])  # type: ignore[attr-defined]  # of OmegaConf's errors
    if re.match(r"Key '.*' not in ", text):
        return where + _unknown(key)
    takes = [f" ({option.type}: {option.help})" for option in describe() if option.key == key]
    return f"{where}{key}: {text}{''.join(takes)}"


def _flat(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("full_key", "object_type", "reference_type")
    return " ".join(line for line in lines if line and not line.startswith(noise))


# --- describing ---


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, dataclass field, value) of every option in a configuration object, in order of the schema."""
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, value


def describe() -> list[Option]:
    """Every option of the schema, for documentation."""
    return [
        Option(key, str(f.type) if get_args(f.type) else f.type.__name__, default, f.metadata["help"],
               limits(f.metadata))
        for key, f, default in leaves(Config())
    ]


def limits(metadata: Any) -> str:
    """What a field may be, as text such as `>= 0, < 1` or `a | b`."""
    if "choices" in metadata:
        return " | ".join(metadata["choices"])
    return ", ".join(f"{sign} {metadata[name]}" for name, (_, sign) in LIMITS.items() if name in metadata)


def to_yaml(cfg: Config) -> str:
    """The whole configuration as YAML, in the order of the schema."""
    import yaml

    return yaml.safe_dump(asdict(cfg), sort_keys=False, allow_unicode=True)


def config_fingerprint(cfg: Config, sections: Sequence[str]) -> str:
    """sha256 (hex) of the named sections or keys of a configuration, dotted (`model`, `roles.policy`, `seed`)."""
    parts = {}
    for name in sections:
        part = reduce(getattr, name.split("."), cfg)
        parts[name] = asdict(part) if is_dataclass(part) else part
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
