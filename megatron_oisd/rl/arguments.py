"""A training run's configuration from YAML files and the command line, which wins over them.

::

    tools/train_rl.py --config qwen3_4b.yaml oisd.yaml --load MCORE_DIR --output RUN_DIR --pp 2

Keys are the flags' names, with ``-`` or ``_``: those of :class:`~megatron_oisd.rl.config.TrainConfig`, ``oisd_...`` or
the same names below ``oisd:``, and for what Megatron-LM has too also its names (``tensor_model_parallel_size``). Of
several files the later wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_oisd import config as oisd_config
from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.config import TrainConfig, flag

CONFIG_FILE = "config.yaml"
"""What a run leaves in its output directory: all of its configuration, fit for ``--config``."""


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as one line with its cure, like every other user error."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage over many lines."""
        raise OISDError(f"{message}; run with --help for the list of flags")


def make_parser() -> Parser:
    """One flag for each field, and Megatron-LM's name for it where it has one."""
    parser = Parser(description="GRPO + OISD on Megatron-Core.", allow_abbrev=False)
    parser.add_argument("--config", nargs="+", type=Path, metavar="YAML", help="files of flags; the later wins")
    for item in dataclasses.fields(TrainConfig):
        names = [flag(item.name)] + ([flag(item.metadata["megatron"])] if item.metadata["megatron"] else [])
        options: dict[str, Any] = {"dest": item.name, "default": item.default, "help": item.metadata["help"]}
        if isinstance(item.default, bool):
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        else:
            kind = {"str | None": str, "int | None": int}.get(str(item.type)) or type(item.default)
            parser.add_argument(*names, type=kind, **options)
    oisd_config.add_arguments(parser)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[TrainConfig, OISDConfig]:
    """Parse a training command line.

    Raises:
        OISDError: a flag or key is unknown, a value is of the wrong kind, or the configuration refuses it.
    """
    parser = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    finder = Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="+", type=Path, default=[])
    files, _ = finder.parse_known_args(words)
    arguments = parser.parse_args([*_words_of_files(files.config, parser), *words])
    values = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(TrainConfig)}
    return TrainConfig(**values), oisd_config.config_from_arguments(arguments)


def write_config(directory: Path, config: TrainConfig, oisd: OISDConfig) -> None:
    """Write :data:`CONFIG_FILE`; only what differs from the defaults, and never ``resume``."""
    values = _changed(config)
    values.pop("resume", None)
    text = yaml.safe_dump({**values, "oisd": _changed(oisd)}, sort_keys=False, allow_unicode=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def _changed(config: TrainConfig | OISDConfig) -> dict[str, Any]:
    values = {item.name: (getattr(config, item.name), item.default) for item in dataclasses.fields(config)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in values.items()
        if value != default
    }


def _words_of_files(paths: Sequence[Path], parser: Parser) -> list[str]:
    """The files' contents as a command line."""
    actions = {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}
    chosen: dict[str, Any] = {}
    for path in paths:
        for key, value in _entries(path):
            action = actions.get(key)
            if action is None or key in ("config", "help") or action.option_strings[0] == "-h":
                near = difflib.get_close_matches(key, actions, 1)
                raise OISDError(
                    f"{path}: {key!r} is no flag of the trainer" + (f"; did you mean {near[0]!r}?" if near else "")
                )
            chosen[action.dest] = _words(path, key, value, action, parser)
    return [word for words in chosen.values() for word in words]


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Keys as flags spell them, and their values."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OISDError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise OISDError(f"--config {path}: not YAML ({' '.join(str(error).split())[:200]})") from error
    if content is None:
        return
    if not isinstance(content, dict):
        raise OISDError(f"--config {path}: expected keys with values, found a {type(content).__name__}")
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name == "oisd" and isinstance(value, dict):
            yield from ((f"oisd-{inner}".replace("_", "-"), entry) for inner, entry in value.items())
        else:
            yield name, value


def _words(path: Path, key: str, value: Any, action: argparse.Action, parser: Parser) -> list[str]:
    """One entry as words of a command line, [] for null: the default."""
    place = f"{path}: {key} is {value!r}"
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise OISDError(f"{place}: expected true or false")
        name = action.option_strings[0]
        return [name if value else "--no-" + name.removeprefix("--")]
    many = action.nargs == "+"
    values = value if many and isinstance(value, list) else [value]
    for entry in values:
        try:
            # A number where text is asked for is fine (a name, say); true, a list or a table is not.
            if isinstance(entry, bool | list | dict):
                raise ValueError
            parser._check_value(action, parser._get_value(action, str(entry)))
        except (ValueError, argparse.ArgumentError) as error:
            kind = " or ".join(action.choices or [getattr(action.type, "__name__", "text")])
            raise OISDError(f"{place}: expected {'a list of ' if many else ''}{kind}") from error
    # With "=" a value may begin with a dash.
    return [action.option_strings[0], *map(str, values)] if many else [f"{action.option_strings[0]}={values[0]}"]
