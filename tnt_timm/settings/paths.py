"""Paths as people write them: `~/runs` and `$SCRATCH/runs` are expanded in files and on the command line alike."""

import contextlib
import contextvars
import os
import re
from typing import Annotated, Iterator

from pydantic import AfterValidator

from tnt_timm.errors import ConfigError

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})", re.ASCII)
_PREFIXES = ("local-dir:", "hfds/")  # before the path of a folder
_for_another_machine = contextvars.ContextVar("for_another_machine", default=False)


def expand(text: str) -> str:
    """Return a path with `~`, `$NAME` and `${NAME}` replaced. URLs, `pipe:` commands and names of models stay as they are.

    Raises:
        ValueError: a variable is not set or there is no such home folder, unless a path of exactly this name exists.
    """
    if "://" in text or text.startswith("pipe:"):
        return text
    for prefix in _PREFIXES:
        if text.startswith(prefix):
            return prefix + expand(text.removeprefix(prefix))
    for found in _VARIABLE.finditer(text):
        if not os.environ.get(found[1].strip("{}")):
            if os.path.lexists(text) or _for_another_machine.get():
                return text
            raise ValueError(f"{text}: the environment variable {found[0]} is not set; set it, or write the path out")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~") and not os.path.lexists(expanded):
        home = expanded.split("/")[0]
        raise ValueError(f"{text}: no home folder {home} is known; write the path out, or ./{home} for this name")
    return expanded


def expand_at(place: str, text: str) -> str:
    """`expand` for a path that no schema checks. Raises ConfigError, which begins with the place."""
    try:
        return expand(text)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


@contextlib.contextmanager
def for_another_machine() -> Iterator[None]:
    """Accept variables that are not set here, such as those of a SLURM job that is still to start."""
    token = _for_another_machine.set(True)
    try:
        yield
    finally:
        _for_another_machine.reset(token)


PathText = Annotated[str, AfterValidator(expand)]
