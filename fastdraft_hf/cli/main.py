"""The `fastdraft` command. Nothing heavy is imported until a command needs it."""

import argparse
import importlib
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from fastdraft_hf import __version__
from fastdraft_hf._errors import FastDraftError, redacted
from fastdraft_hf._processes import MainProcessError, is_main, rank, started, world

# command -> (module that has `add_arguments` and `run`, one line of help)
COMMANDS = {
    "run": ("run", "run a recipe: every stage that is not finished"),
    "plan": ("plan", "estimate what a recipe costs on some hardware, and what it gains"),
    "tune": ("tune", "find the best draft shape and γ on this machine"),
    "evaluate": ("evaluate", "measure a draft's acceptance rate on held-out prompts"),
    "bench": ("evaluate", "measure wall-clock time with and without a draft"),
    "audit": ("audit", "test whether an engine's sampling with a draft is the target's own"),
    "export": ("export", "export a draft or a target for OpenVINO or llama.cpp"),
    "push": ("push", "push a draft to the Hub or into a folder"),
    "pull": ("push", "download a draft from the Hub"),
    "demo": ("demo", "answer a prompt with and without the draft, side by side"),
    "vocabulary": ("vocabulary", "compare two models' vocabularies"),
    "schema": ("schema", "print the settings of a recipe"),
}

EPILOG = """\
start here:
  fastdraft run recipes/smollm2-135m/quickstart.yaml      a draft for a real target, measured
  fastdraft run RECIPE.yaml --dry-run                     print what would be done
  fastdraft schema align                                  the settings of a stage
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors do not repeat a credential."""

    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only ``command``'s own arguments are filled in."""
    parser = _Parser(
        prog="fastdraft",
        description="Give a language model its own draft, so that it decodes faster with the same "
        "output (FastDraft, arXiv 2411.11055).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdraft_hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, help_line) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=help_line, description=help_line[0].upper() + help_line[1:] + "."
        )
        if name == command:
            importlib.import_module(f"fastdraft_hf.cli.{module}").add_arguments(sub, name)
    return parser


def _without_secrets(record: logging.LogRecord) -> bool:
    """Redact credentials in a log line, which may quote a library's message."""
    record.msg, record.args = redacted(record.getMessage()), ()
    return True


def _traceback(*error: Any) -> None:
    """Print the traceback of a bug without credentials."""
    print(redacted("".join(traceback.format_exception(*error))), file=sys.stderr)


def _parse(words: list[str]) -> argparse.Namespace:
    command = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser(command if command in COMMANDS else None)
    args, rest = parser.parse_known_args(words)
    # argparse returns key=value arguments that follow an option as unknown.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and not hasattr(args, "overrides")):
        word = (unknown or rest)[0]
        parser.error(f"unknown argument {word}; see fastdraft {command} --help")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if args.command is None:
        parser.print_help()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    This is the only place that turns errors into lines: 2 for input that the user can fix, 1 for
    a failure of the machine (a full disk, no memory), 130 for Ctrl-C. Any other exception is a
    bug and keeps its traceback.
    """
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    if args.command is None:
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    sys.excepthook = _traceback
    for handler in logging.getLogger().handlers:
        handler.addFilter(_without_secrets)
    # Of several processes, the main one reports.
    logging.getLogger("fastdraft_hf").setLevel(logging.INFO if is_main() else logging.ERROR)
    module = importlib.import_module(f"fastdraft_hf.cli.{COMMANDS[args.command][0]}")
    try:
        return int(module.run(args) or 0)
    except FastDraftError as error:
        _report(error)
        return 2
    except KeyboardInterrupt:
        if is_main():
            print("\nfastdraft: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (`head`) has gone
        sys.stderr.close()
        return 0
    except Exception as error:
        if not _of_the_machine(error):
            raise
        _report(error)
        return 1


def _of_the_machine(error: Exception) -> bool:
    """Return whether an error is a full disk, a lack of memory or the like, of any library."""
    if isinstance(error, OSError | ImportError | MemoryError) or _lost_process(error):
        return True
    # torch and safetensors, which may not be imported, report a full disk by errors of their own.
    out_of_memory = type(error).__name__ == "OutOfMemoryError"
    return out_of_memory or "(os error " in str(error) or "failed writing" in str(error)


def _lost_process(error: BaseException) -> bool:
    """Return whether torch.distributed says that another process has ended."""
    return started() and ("gloo" in str(error) or type(error).__name__.startswith("Dist"))


def _report(error: BaseException) -> None:
    """Print one line; an error that all processes share is printed once."""
    prefix = "fastdraft: "
    if not is_main():
        if isinstance(error, MainProcessError) or not started():
            return
        # If the main process fails as well, the launcher ends this one before it reports.
        time.sleep(2)
        prefix += f"process {rank()} of {world()}: "
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        line = f"{error.filename}: {error.strerror}"
    elif _lost_process(error):
        line = f"another process has ended; the same command resumes ({line.partition('. ')[0]})"
    print(f"{prefix}{redacted(line)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
