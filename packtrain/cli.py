"""The `packtrain` command: reads the command line, then hands over to the module of one command.

Nothing heavy is imported here, and a command's module only when the command is called: `--help`
and `validate` must answer at once, without torch and ray.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from ground.errors import PacktrainError, RecipeError
from ground.imports import without_collection
from ground.logs import redact

EXIT_CODES = """\
exit codes: 0 done, 2 recipe or command line, 3 data, 4 environment, 5 diverged or no signal,
6 workers lost, 130/143 interrupted and saved, 1 a defect of packtrain"""


@dataclass(frozen=True, slots=True)
class Command:
    """One word of the command line and the module whose `command(arguments)` serves it.

    Example:
        Command("status", "how far a run is", "packtrain.status", _status_arguments)
    """

    name: str
    help: str
    module: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the console script; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = parse(words)
        command = next(each for each in COMMANDS if each.name == arguments.command)
        return int(_imported(command.module).command(arguments))
    except PacktrainError as error:
        sys.stderr.write(f"packtrain: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("packtrain: interrupted\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception:
        return _report_defect()


def _imported(module: str) -> ModuleType:
    """The module of a command, quickly: most of the time of a light one goes into importing.

    Plugins of pydantic, which would be looked for in the metadata of every installed library, have
    no business here.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    with without_collection():
        return importlib.import_module(module)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; overrides (`key.path=value`) may stand anywhere after the recipe.

    Raises:
        RecipeError: a word is not known; the message names the nearest one that is.
    """
    names = [command.name for command in COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in names:
        _refuse(words[0], "command", names)
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    flags = _flags_of(arguments.command)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    for word in rest:
        if word.startswith("-"):
            _refuse(word, "flag", flags)
        if word not in overrides:
            raise RecipeError(f"unexpected argument '{word}'", fix="packtrain --help")
    if overrides and "overrides" not in arguments:
        raise RecipeError(
            f"`packtrain {arguments.command}` takes no overrides, got '{overrides[0]}'"
        )
    arguments.overrides = overrides
    return arguments


def _report_defect() -> int:
    """The last resort: what no error of ours describes, told once and without secrets."""
    sys.stderr.write(f"packtrain: a defect of packtrain:\n{redact(traceback.format_exc())}")
    return 1


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints turned into our errors."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message, fix=f"{self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="packtrain",
        description="Post-training along a trail of stages: prune, SFT, mine, online RL, DPO.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False
        )
        command.add_arguments(sub)
    return parser


def _flags_of(name: str) -> list[str]:
    """The flags that a command understands."""
    command = next(each for each in COMMANDS if each.name == name)
    probe = argparse.ArgumentParser()
    command.add_arguments(probe)
    return re.findall(r"--[a-z]+", probe.format_usage())


def _refuse(word: str, kind: str, known: Sequence[str]) -> NoReturn:
    near = get_close_matches(word.split("=")[0], known, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"
    raise RecipeError(f"'{word}' is not a {kind}{hint if known else ''}", fix="packtrain --help")


def _recipe_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="path of a recipe.yaml")
    parser.set_defaults(overrides=[])
    parser.epilog = "KEY.PATH=VALUE after RECIPE changes one value of it."


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_argument(parser)
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="run directory (default: runs/<name>)"
    )
    begun = parser.add_mutually_exclusive_group()
    begun.add_argument("--resume", action="store_true", help="go on where a stopped run ended")
    begun.add_argument("--overwrite", action="store_true", help="discard what the run holds")
    begun.add_argument(
        "--from",
        dest="start",
        default="",
        metavar="STAGE",
        help="discard STAGE and all that is made from it, and go on from there; `base` and "
        "`evaluate` stand for the evaluation of the base and for all evaluations",
    )
    parser.add_argument(
        "--accelerate",
        type=Path,
        metavar="FILE",
        help="start sft, rl and dpo through `accelerate launch --config_file FILE`",
    )


def _run_directory_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/tiny")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_argument(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="devices (default: this machine's)")
    parser.add_argument(
        "--gpu", default="", metavar="KIND", help="a100, h100 (default with --gpus), h200 or cpu"
    )
    parser.add_argument(
        "--tokens", type=float, metavar="N", help="mean length of an answer, where it is known"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="play it through, with the real controller"
    )
    parser.add_argument(
        "--skew", type=float, default=1.0, metavar="SIGMA", help="of the lengths, with --simulate"
    )
    parser.add_argument(
        "--switch",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="lost in a step in turns on shared devices, with --simulate",
    )


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    _run_directory_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _run_directory_argument(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write (default: RUN/report.html)"
    )


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    _run_directory_argument(parser)
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="dropped, kept or groups (default: all)"
    )
    parser.add_argument("--prompt", default="", metavar="ID", help="of this id, or its beginning")
    parser.add_argument("--capability", default="", metavar="NAME", help="of this capability")
    parser.add_argument("--step", type=int, metavar="N", help="groups of this step of rl")
    fates = parser.add_mutually_exclusive_group()
    for fate, meaning in (
        ("flat", "groups whose rewards were all equal"),
        ("trained", "groups that were trained on"),
    ):
        fates.add_argument(
            f"--{fate}", dest="fate", action="store_const", const=fate, default="", help=meaning
        )
    parser.add_argument("--full", action="store_true", help="long texts whole, not shortened")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="preview|stats|convert")
    preview = actions.add_parser("preview", help="the first rows, as packtrain understands them")
    stats = actions.add_parser("stats", help="layouts, lengths, bad lines, the lines for a recipe")
    convert = actions.add_parser("convert", help="write rows that every stage reads")
    for each in (preview, stats, convert):
        each.add_argument("file", type=Path, metavar="FILE", help="JSON lines, parquet or an array")
    preview.add_argument("--rows", type=int, default=3, metavar="N", help="how many (default: 3)")
    stats.add_argument("--model", type=Path, metavar="DIR", help="count in this model's tokens")
    stats.add_argument("--max-length", type=int, metavar="N", help="count rows of more tokens")
    convert.add_argument("target", type=Path, metavar="TARGET", help="a .jsonl file to write")
    convert.add_argument(
        "--max-bad", type=int, default=0, metavar="N", help="bad rows to leave out (default: 0)"
    )


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|cp")
    actions.add_parser("ls", help="list the recipes that come with packtrain")
    copy = actions.add_parser("cp", help="copy one to change it")
    copy.add_argument("name", metavar="NAME", help="as `packtrain recipes ls` prints it")
    copy.add_argument("target", type=Path, metavar="TARGET", help="file or folder to copy to")


def _teacher_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="info|fill")
    for name, told in (
        ("info", "what the store of a recipe holds, and what is missing: size and time"),
        ("fill", "the same, then have the teacher say what is missing or damaged"),
    ):
        action = actions.add_parser(name, help=told, description=told)
        _recipe_argument(action)
        action.add_argument(
            "--run", type=Path, metavar="DIR", help="run directory (default: runs/<name>)"
        )


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


COMMANDS = (
    Command("run", "run the stages of a recipe in order", "packtrain.runner", _run_arguments),
    Command(
        "validate", "check a recipe without running it", "packtrain.validate", _recipe_argument
    ),
    Command("plan", "who gets which devices, and how fast", "packtrain.plan", _plan_arguments),
    Command(
        "teacher",
        "size and time of a teacher's targets; fill",
        "packtrain.teacher",
        _teacher_arguments,
    ),
    Command("status", "how far a run is, from any shell", "packtrain.status", _status_arguments),
    Command("report", "write a run's report.html", "packtrain.report", _report_arguments),
    Command(
        "view", "page through kept and dropped rows and groups", "packtrain.view", _view_arguments
    ),
    Command("data", "look at a data file of your own", "packtrain.data", _data_arguments),
    Command("doctor", "check this machine and installation", "packtrain.doctor", _no_arguments),
    Command("recipes", "list or copy recipes", "packtrain.recipes", _recipes_arguments),
)
