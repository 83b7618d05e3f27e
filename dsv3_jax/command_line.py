"""What every experiment script shares: dotted overrides, one-line errors, the compilation cache."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from dsv3_jax.config import Config, ConfigError, load
from dsv3_jax.runtime import tune_process

OVERRIDE = re.compile(r"--?config\.([\w.]+)(?:=(.*))?", re.DOTALL)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates `--config.a.b=value` (or `--config.a.b value`) from the other arguments, in order."""
    rest, overrides, index = [], [], 0
    while index < len(argv):
        match = OVERRIDE.fullmatch(argv[index])
        if match is None:
            rest.append(argv[index])
        else:
            value = match.group(2)
            if value is None:
                index += 1
                if index == len(argv):
                    raise ConfigError(f"{argv[-1]}: needs a value, as in {argv[-1]}=VALUE")
                value = argv[index]
            overrides.append((match.group(1), value))
        index += 1
    return rest, overrides


_overrides: list[tuple[str, str]] = []


def load_config(path: str) -> Config:
    """The config file of `--config`, with this command's overrides."""
    return load(path, _overrides)


def config_overrides() -> list[tuple[str, str]]:
    """This command's `--config.PATH=VALUE` settings, in order."""
    return list(_overrides)


def run(main: Callable[[], Any]) -> None:
    """Parses flags and calls `main`. What the user can mend ends as one line on stderr and exit code 1 or 2."""

    def parse(argv: Sequence[str]) -> list[str]:
        rest, overrides = split_overrides(argv)
        _overrides.extend(overrides)
        rest = flags.FLAGS(rest)
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; options are written --name=value (see --help)")
        return rest

    def guarded(argv: Sequence[str]) -> Any:
        del argv
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it renames
        tune_process()
        return main()

    sys.modules["__main__"].__doc__ = (sys.modules["__main__"].__doc__ or "").strip()
    try:
        app.run(guarded, flags_parser=lambda argv: _parse_or_exit(parse, argv))
    except ConfigError as error:
        sys.exit(f"error: {error}")


def _parse_or_exit(parse: Callable[[Sequence[str]], list[str]], argv: Sequence[str]) -> list[str]:
    try:
        if any(a in ("-h", "--help", "-help") for a in argv):
            return app.parse_flags_with_usage([*argv[:1], "--help"])
        return parse(argv)
    except flags.Error as error:
        sys.exit(f"error: {error} (see --help)")
