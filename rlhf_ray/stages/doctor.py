"""What this machine has and lacks for this configuration, each with what to do. Touches no network."""

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from rlhf_ray.config.schema import ClusterConfig, Config, RolesConfig
from rlhf_ray.storage import local_root, url_of
from rlhf_ray.versions import TESTED, find, installed

GIB = 2**30
OPTIONAL = ("datasets",)  # only hf:// names need it


class Check(NamedTuple):
    """One row of the table. `fail`: the configured run cannot work; `todo`: what to do, empty when ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    todo: str = ""


def run(cfg: Config) -> None:
    """Print the table. Exit status 1 (SystemExit) if anything that the run needs is missing."""
    checks = [
        *python_packages(),
        *machine(cfg),
        *compilers(),
        *accelerators(cfg),
        *cluster(cfg.cluster),
    ]
    table = Table(title="rlhf-ray doctor")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        table.add_row(f"[{colour[check.status]}]{check.status}[/]", check.name, check.found, check.todo)
    console = Console()
    console.print(table)
    failed = [check.name for check in checks if check.status == "fail"]
    warned = sum(check.status == "warn" for check in checks)
    console.print(f"{len(failed)} to fix ({', '.join(failed)})" if failed else f"ready, {warned} warnings",
                  style="red" if failed else "green", markup=False)
    if failed:
        raise SystemExit(1)


def graded(name: str, value: float, need: float, like: float, unit: str, todo: str) -> Check:
    """Fail below `need`, warn below `like`, in `unit`."""
    status: Literal["ok", "warn", "fail"] = "fail" if value < need else "warn" if value < like else "ok"
    return Check(name, status, f"{value:.{1 if unit == 'GiB' else 0}f} {unit}", "" if status == "ok" else todo)


def python_packages() -> Iterator[Check]:
    """Python and the stack against the tested versions, read from metadata: nothing is imported."""
    ok = sys.version_info >= (3, 11)
    yield Check("python", "ok" if ok else "fail", platform.python_version(), "" if ok else "use Python 3.11 or newer")
    found = installed()
    for name, tested in TESTED.items():
        version = found.get(name)
        if version is None:
            yield Check(name, "warn" if name in OPTIONAL else "fail", "not installed",
                        f"install {name}=={tested}; the cpu and gpu extras of rlhf-ray bring it")
        elif version.split("+")[0] != tested:
            yield Check(name, "warn", version, f"{tested} was tested; if something breaks, install that")
        else:
            yield Check(name, "ok", version)
    companions = {name: find(name) for name in ("torchvision", "torchaudio", "torchcodec")}
    yield from torch_companions(found.get("torch", ""), companions)


def protocol_of(output_dir: str) -> Iterator[Check]:
    """Whether fsspec can open an output_dir that is a URL."""
    if "://" not in output_dir:
        return
    from fsspec.registry import get_filesystem_class

    name = output_dir.partition("://")[0]
    try:
        found = get_filesystem_class(name)
        yield Check(f"{name}://", "ok", f"{found.__module__}.{found.__name__}")
    except (ImportError, ValueError) as error:
        yield Check(f"{name}://", "fail", str(error), "install its package on every node, or set another output_dir")


def torch_companions(torch: str, companions: dict[str, str | None]) -> Iterator[Check]:
    """CUDA builds of torchvision and the like beside a CPU torch break every transformers model import."""
    wrong = {name: v for name, v in companions.items() if v is not None and not v.endswith("+cpu")}
    if torch.endswith("+cpu") and wrong:
        yield Check("torch companions", "fail", ", ".join(f"{name} {v}" for name, v in wrong.items()),
                    f"not CPU builds, and nothing here needs them: pip uninstall -y {' '.join(wrong)}")


def machine(cfg: Config) -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    yield graded("cores", cores, 1, 2, "cores", "one core works, slowly")
    yield graded("available memory", available_memory() / GIB, 3, 10, "GiB",
                 "the quickstart takes up to 10 GiB: close other programs, or lower roles.*.ranks and replicas")
    yield from protocol_of(cfg.output_dir)
    directory = local_root(cfg.output_dir)
    where = directory if url_of(directory) else cfg.output_dir
    while not directory.exists():
        directory = directory.parent
    yield graded(f"free disk in {where}", shutil.disk_usage(directory).free / GIB, 1, 5, "GiB",
                 "free some, or set output_dir to a larger disk")
    writable = os.access(directory, os.W_OK)
    if not writable:
        yield Check("output_dir", "fail", f"{directory} is not writable", "set output_dir to a directory of yours")
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total / GIB if shm.exists() else 0.0
    yield graded("/dev/shm", size, 0, cfg.cluster.object_store_gib, "GiB",
                 "smaller than cluster.object_store_gib, so Ray's object store goes to disk: enlarge it "
                 "(docker run --shm-size=2g), or lower cluster.object_store_gib")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = float("inf") if soft == resource.RLIM_INFINITY else soft
    yield graded("open files", limit, 256, 4096, "descriptors",
                 f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}")


def available_memory() -> float:
    """Bytes that new processes can have: of the machine, or of the control group when that is tighter."""
    pages = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = float(pages["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no cgroup v2 here
        return available
    return available if limit == "max" else min(available, float(limit) - float(used))


def compilers() -> Iterator[Check]:
    for program, why in (("g++", "apt-get install g++"), ("ninja", "pip install ninja")):
        path = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
        yield Check(program, "ok" if path else "warn", path or "not found",
                    "" if path else f"DeepSpeed and torch may want to compile kernels: {why}")


def wanted_gpus(roles: RolesConfig) -> float:
    """GPUs that the largest stage asks for when every role has its own."""
    generator = roles.generator
    ppo = generator.replicas * generator.tensor_parallel_size * generator.gpus
    ppo += sum(role.replicas * role.gpus for role in (roles.reward, roles.reference))
    ppo += sum(role.ranks * role.gpus for role in (roles.policy, roles.critic))
    return max(ppo, roles.supervised.ranks * roles.supervised.gpus)


def accelerators(cfg: Config) -> Iterator[Check]:
    want = wanted_gpus(cfg.roles)
    if cfg.cluster.placement == "colocated":  # generators sit on the policy's devices
        generator, policy = cfg.roles.generator, cfg.roles.policy
        want -= min(generator.replicas * generator.gpus, policy.ranks * policy.gpus)
    here = cfg.cluster.address == "local"
    if find("torch") is None:
        return
    import torch

    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
    short = here and count < want
    todo = (f"the configuration asks for {want:g}: lower roles.*.gpus, or set cluster=join for a larger cluster"
            if short else "")
    yield Check("GPUs", "fail" if short else "ok", f"{count} {names}".strip() if count else "none", todo)
    if not count and shutil.which("nvidia-smi"):
        yield Check("CUDA in torch", "warn", torch.__version__, "there is an NVIDIA driver: install the gpu extra")
    if count:
        nccl = torch.distributed.is_nccl_available()
        yield Check("NCCL", "ok" if nccl else "fail", str(torch.cuda.nccl.version()) if nccl else "not in this torch",
                    "" if nccl else "install a CUDA build of torch")
        if cfg.model.attn_implementation == "flash_attention_2" and find("flash-attn") is None:
            yield Check("flash-attn", "fail", "not installed",
                        "pip install flash-attn, or set model.attn_implementation=sdpa")


def cluster(cfg: ClusterConfig) -> Iterator[Check]:
    """How Ray will authenticate. A private Ray serves one run on loopback and needs no token."""
    if cfg.address == "local":
        yield Check("Ray", "ok", "private, on this machine")
        return
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    token = (
        "RAY_AUTH_TOKEN" in os.environ
        or Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser().is_file()
    )
    found = f"cluster.address={cfg.address}, RAY_AUTH_MODE={mode}, {'a token' if token else 'no token'}"
    if mode != "token":
        yield Check("Ray", "warn", found, "anybody who reaches the cluster can run code on it: RAY_AUTH_MODE=token")
    elif not token:
        yield Check("Ray", "fail", found, "`ray get-auth-token --generate` on the head, the same token on every node")
    else:
        yield Check("Ray", "ok", found)
