"""The `fastdraft` command. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Sequence

from fastdraft_hf import __version__
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import MainProcessError, is_main, rank, started, world
from fastdraft_hf._redact import redacted

# command -> (module that has `add_arguments` and `run`, one line of help)
COMMANDS = {
    "run": ("run", "run a recipe: every stage that is not finished"),
    "design": ("stage", "the draft's shape and initialization"),
    "generate": ("stage", "let the target write the training text"),
    "logits": ("stage", "store the target's top-k distribution over that text"),
    "pretrain": ("stage", "train the draft on text (PT)"),
    "continue": ("stage", "train it further, usually with code (CP)"),
    "align": ("stage", "train it on the target's own answers (FT)"),
    "export": ("export", "write a draft or a target for OpenVINO or llama.cpp"),
    "evaluate": ("stage", "measure acceptance on held-out prompts"),
    "bench": ("stage", "measure wall clock with and without the draft"),
    "card": ("stage", "assemble the draft's folder with its model card"),
    "report": ("stage", "draw the figures and write report.html"),
    "tune": ("tune", "find the best draft shape and γ on this machine"),
    "vocabulary": ("vocabulary", "say whether two models' vocabularies are the same"),
    "demo": ("demo", "answer a prompt with and without the draft, side by side"),
    "push": ("push", "send a draft to the Hub in one commit, or write the same files to a folder"),
    "pull": ("pull", "fetch a draft from the Hub"),
    "plan": ("plan", "what a recipe costs on some hardware, and what the draft should bring"),
    "schema": ("schema", "print the JSON schema of a recipe"),
}

EPILOG = """\
start here:
  fastdraft run recipes/smollm2-135m/quickstart.yaml      a draft for a real target, measured
  fastdraft run RECIPE.yaml --dry-run                     what would be done
  fastdraft COMMAND --help                                the settings of one stage
"""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only ``command``'s own arguments are filled in."""
    parser = argparse.ArgumentParser(
        prog="fastdraft",
        description="Make a language model its own draft, so that it decodes faster with the same "
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
    """Blot credentials out of a log line, which may quote a library's message."""
    record.msg, record.args = redacted(record.getMessage()), ()
    return True


def _report(error: FastDraftError) -> None:
    """Print one line; an error that all processes share is printed once."""
    prefix = "fastdraft: "
    if not is_main():
        if isinstance(error, MainProcessError) or not started():
            return
        # If the main process failed as well, the launcher ends this one before it speaks.
        time.sleep(2)
        prefix += f"process {rank()} of {world()}: "
    print(f"{prefix}{redacted(str(error))}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (2 for input a user can mend)."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser(command if command in COMMANDS else None)
    args, rest = parser.parse_known_args(words)
    # argparse gives key=value words that follow an option back as unknown.
    free = getattr(args, "free_words", False)  # the command judges words without = itself
    unknown = [word for word in rest if word.startswith("-") or not (free or "=" in word)]
    if unknown or (rest and not hasattr(args, "overrides")):
        word = redacted((unknown or rest)[0])
        parser.error(f"unknown argument {word}; see fastdraft {command} --help")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if args.command is None:
        parser.print_help()
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_without_secrets)
    # Of several processes, the main one speaks.
    logging.getLogger("fastdraft_hf").setLevel(logging.INFO if is_main() else logging.ERROR)
    module = importlib.import_module(f"fastdraft_hf.cli.{COMMANDS[args.command][0]}")
    try:
        return int(module.run(args) or 0)
    except FastDraftError as error:
        _report(error)
        return 2
    except KeyboardInterrupt:
        print("\nfastdraft: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (`head`) has gone
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
