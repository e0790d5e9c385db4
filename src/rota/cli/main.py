"""The way in: finds the verb, runs it, and turns every error into `error:` and `hint:` lines and an exit code.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the run failed, or found what it was to look for (a difference, a failed check) |
| 2 | bad input: a flag, a file, a configuration |
| 70 | a bug in Rota; the traceback is in a file |
| 130 | interrupted |
| 141 | whoever read the output has gone |
"""

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rota import __version__
from rota.base.errors import CapabilityError, ConfigError, DataError, RotaError
from rota.base.nearest import did_you_mean
from rota.cli.output import print_error, say
from rota.cli.verbs import VERBS, Verb

FAILED = 1
BAD_INPUT = 2
INTERNAL = 70
INTERRUPTED = 130
READER_GONE = 141

_HELP_FLAGS = ("--help", "-h")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` if none is given); returns the exit code. Raises nothing."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words)
        sys.stdout.flush()
    except RotaError as error:
        notes = getattr(error, "__notes__", [])
        print_error("\n".join([error.message, *notes]), error.hint)
        return BAD_INPUT if isinstance(error, ConfigError | DataError | CapabilityError) else FAILED
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return READER_GONE
    except Exception as error:
        return _internal_error(error, words)
    return code


def _run(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"rota {__version__}")
        return 0
    return _run_one_of("", VERBS, words)


def _run_one_of(before: str, verbs: Mapping[str, Verb], words: list[str]) -> int:
    """Run one of `verbs`, which stand behind the words `before`."""
    if not words or words[0] in _HELP_FLAGS:
        print(_help(before, verbs))
        return 0 if words else BAD_INPUT
    name, *rest = words
    if name.startswith("-"):
        raise ConfigError(f"unknown flag {name}", hint=f"a verb comes first; see rota {before}--help")
    if name not in verbs:
        raise ConfigError(f"unknown verb {before + name!r}", hint=did_you_mean(name, verbs))
    verb = verbs[name]
    if verb.parts:
        return _run_one_of(f"{before}{name} ", verb.parts, rest)
    module, _, function = verb.target.partition(":")
    return _invoke(before + name, getattr(importlib.import_module(module), function), rest)


def _help(before: str, verbs: Mapping[str, Verb]) -> str:
    width = max(map(len, verbs))
    listed = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in verbs.items())
    if before:
        return f"usage: rota {before}VERB [FLAGS]\n\n{listed}\n\n  rota {before}VERB --help shows a verb's flags"
    return (
        "Rota decides what runs next, where and when, for AI work on scarce accelerators\n\n"
        f"usage: rota VERB [FLAGS]\n\n{listed}\n\n"
        "  rota VERB --help shows a verb's flags; every verb takes --json; rota --version"
    )


def _invoke(name: str, function: Callable[..., Any], words: list[str]) -> int:
    import typer

    # Its class of usage errors has no public name; BadParameter stands right below it.
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, context_settings={"help_option_names": list(_HELP_FLAGS), "max_content_width": 100})(function)
    command = typer.main.get_command(app)
    try:
        with command.make_context(f"rota {name}", [*words]) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except usage_error as error:
        raise _in_our_voice(error, name, words) from None
    return 0


def _in_our_voice(error: Any, verb: str, words: Sequence[str]) -> ConfigError:
    """A usage error as all our errors are: it begins with the flag, and a hint says what to do."""
    hint = f"see rota {verb} --help"
    message = error.format_message().strip().rstrip(".")
    command = error.ctx.command if error.ctx is not None else None
    flag: str | None = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and flag is not None and command is not None:
        known = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
        return ConfigError(f"unknown flag {flag} of rota {verb}", hint=did_you_mean(flag, known))
    for opening, said in (("Invalid value for ", ""), ("Missing argument", "missing"), ("Missing option", "missing")):
        if message.startswith(opening):
            spot, _, what = message.removeprefix(opening).strip().partition(": ")
            spot = spot.partition(" / ")[0].strip("'\" ")
            what = what.removeprefix("Value error, ") or said
            given = _as_given(spot, words)
            what += f", in {given!r}" if given is not None and repr(given) not in what else ""
            return ConfigError(f"{spot}: {what[:1].lower()}{what[1:]}", hint=hint)
    if flag is not None:
        return ConfigError(f"{flag}: needs a value", hint=hint)
    if message.startswith("Got unexpected extra argument"):
        return ConfigError(f"unexpected argument {message.partition('(')[2].partition('(')[2].rstrip(')')}", hint=hint)
    return ConfigError(message[:1].lower() + message[1:], hint=hint)


def _as_given(flag: str, words: Sequence[str]) -> str | None:
    """The value that a flag was given, where there is one."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            values = [value] if equals else words[index + 1 : index + 2]
            return values[0] if values else None
    return None


def _internal_error(error: Exception, words: list[str]) -> int:
    where = "and its traceback could not be written"
    with suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="rota-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"rota {__version__}, python {sys.version.split()[0]}, arguments {words!r}\n\n")
            traceback.print_exception(error, file=file)
        where = f"its traceback is in {path}"
    said = " ".join(str(error).split())
    print_error(
        f"internal error {type(error).__name__}{f' ({said})' if said else ''}; {where}",
        "this is a bug in Rota; please report it with that file",
    )
    return INTERNAL


def _close_stdout() -> None:
    """Point stdout at nothing, so that Python's last flush does not complain about the reader that left."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
