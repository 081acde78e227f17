"""What Hydra and OmegaConf raise, in one line for the one who typed it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harness import wording

#: Everything that composing can raise because of what was typed or what a yaml says.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ConfigLoadError, YAMLError, ValueError)

_UNKNOWN_KEY = re.compile(
    r"(?:In '[^']*': )?(?:Could not override|Could not delete(?: from config\.)?) '([^'=]+)"
)
_FULL_KEY = re.compile(r"^\s*full_key: (\S+)", re.MULTILINE)
_HINTS = re.compile(
    r"\s*(?:See https|full_key:|object_type=|Config search path:|To append to your).*", re.DOTALL
)


def explain(error: BaseException, *, loader: ConfigLoader, config_name: str, overrides: Sequence[str]) -> str:
    """Name the value, the rule and the mend.

    Args:
        overrides: the command line, to tell which keys there are under the options it chooses.
    """
    if isinstance(error, OverrideParseException):
        if error.override in loader.get_group_options("experiment"):
            return f"cannot read {error.override!r}; did you mean experiment={error.override}?"
        return _unreadable(error)
    unnamed = next((line for line in overrides if line.startswith("=")), None)
    if unnamed is not None:
        return f"cannot read {unnamed!r}: the key is missing; write KEY=VALUE"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return wording.unknown_option(group, option, list(error.options))
    if type(error) is ValueError:
        return _odd_option(loader, overrides) or wording.one_line(str(error))
    found = _UNKNOWN_KEY.match(str(error))
    anything: Any = loader
    if found and anything.repository.group_exists(found[1]):
        return f"{found[1]}: the group takes no part in a run; leave it out"
    if found:
        return wording.unknown_key(found[1], known_keys(loader, config_name, overrides))
    if isinstance(error.__cause__, OmegaConfBaseException):
        message = _without_hints(error.__cause__)
        return f"{_without_hints(error)}: {message}".removeprefix(": ")
    return _without_hints(error)


def known_keys(loader: ConfigLoader, config_name: str, overrides: Sequence[str]) -> list[str]:
    """Every key there is, under the options that the command line chooses if they can be composed."""
    anything: Any = loader
    choices = [line for line in overrides if anything.repository.group_exists(line.partition("=")[0])]
    for attempt in (choices, []):
        try:
            config = loader.load_configuration(config_name, overrides=attempt, run_mode=RunMode.MULTIRUN)
        except COMPOSITION_ERRORS:
            continue
        plain = OmegaConf.to_container(config, resolve=False)
        assert isinstance(plain, dict)
        plain.pop("hydra", None)
        keys = wording.flat_keys({str(key): value for key, value in plain.items()})
        return [*keys, *anything.list_groups("")]
    return []


def _odd_option(loader: ConfigLoader, overrides: Sequence[str]) -> str:
    """What is wrong with `task=1`: options are words. Empty if it is not that."""
    anything: Any = loader
    for line in overrides:
        group, _, option = line.partition("=")
        options = loader.get_group_options(group) if anything.repository.group_exists(group) else []
        if options and option not in options:
            return wording.unknown_option(group, option, options)
    return ""


def _unreadable(error: OverrideParseException) -> str:
    """Hydra's parser points with a caret or echoes the input; the input itself says more."""
    reason = str(error).removeprefix(f"Error parsing override '{error.override}'")
    reason = reason.split("See https")[0].strip()
    if reason.startswith("LexerNoViableAltException"):
        odd = re.search(r"[^\x20-\x7e]", error.override)
        reason = (
            f"the character {odd[0]!r} does not belong there"
            if odd
            else "there is a character that does not belong"
        )
    return f"cannot read {error.override!r}: {reason}; write KEY=VALUE, and put odd values in quotes"


def _without_hints(error: BaseException) -> str:
    """The message without addresses, search paths and OmegaConf's footers, but with the key it is about."""
    text = str(error)
    key = _FULL_KEY.search(text)
    message = wording.one_line(_HINTS.sub("", text))
    return f"{key[1]}: {message}" if key and key[1] not in message else message
