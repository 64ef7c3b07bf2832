"""What an entry of reward.sources may be. Imports nothing but the standard library."""

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from rlhf_ray.errors import UserError

SERVICE = ("http://", "https://")  # how a source begins that is a service


def source_file(source: str) -> Path | None:
    """Where the function of MODULE:FUNCTION is written, looked for as its actor does: in the working directory first.

    Nothing is imported. None for a source that is no function, and where there is no such file.
    """
    if source == "model" or source.startswith(SERVICE):
        return None
    module = Path(*source.partition(":")[0].split("."))
    files = (place / file for place in (Path.cwd(), *map(Path, sys.path))
             for file in (module.with_suffix(".py"), module / "__init__.py"))
    return next((file for file in files if file.is_file()), None)


def check_source(source: str) -> None:
    """Raises UserError unless `source` is `model`, MODULE:FUNCTION or an http(s) URL without a password in it."""
    if source.startswith(SERVICE):
        try:
            url = urlsplit(source)
            good = bool(url.hostname) and url.port != 0 and not re.search(r"[\s\x00-\x1f\x7f]", source)
        except ValueError:  # a port or an IPv6 address that is none
            good = False
        if good and "@" in url.netloc:
            host = url.netloc.rpartition("@")[2]
            raise UserError(f"reward.sources={url.scheme}://...@{host}: no user or password in the URL, for it is "
                            "printed and saved; put a token into RLHF_RAY_REWARD_TOKEN")
    else:
        module, _, function = source.partition(":")
        good = source == "model" or (all(part.isidentifier() for part in module.split(".")) and function.isidentifier())
        if good and module.endswith(".py"):
            raise UserError(f"reward.sources={source}: a module's name has no .py; write {module[:-3]}:{function}")
    if not good:
        raise UserError(f"reward.sources={ascii(source)[1:-1]}: must be model, MODULE:FUNCTION or an http(s) URL")
