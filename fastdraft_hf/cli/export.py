"""``fastdraft export openvino|gguf MODEL``, and ``fastdraft export`` as the stage of a run.

The first form takes any folder or Hub id and needs no run; the second is the stage's command like
every other (`cli.stage`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fastdraft_hf.cli import stage

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = ("openvino", "gguf")
_DEFAULTS = {"openvino": "int8", "gguf": "f16"}

_DESCRIPTION = """\
fastdraft export openvino MODEL [--weight-format int8] [--output DIR] [--target T]
fastdraft export gguf MODEL [--weight-format f16] [--output FILE] [--target T]
    a draft or a target, any folder or Hub id, for other engines
fastdraft export --config RECIPE.yaml | --output-dir RUN
    the stage of a run
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    stage.add_arguments(parser, name)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "fastdraft export [openvino|gguf MODEL] [options] [key=value ...]"
    parser.description = _DESCRIPTION
    # The two words may stand before or after options.
    parser.set_defaults(free_words=True)
    group = parser.add_argument_group("export openvino|gguf MODEL")
    group.add_argument(
        "--weight-format",
        metavar="FORMAT",
        help="openvino: fp32, fp16, int8, int4 (default: int8); gguf: f32, f16, bf16, q8_0 "
        "(default: f16)",
    )
    group.add_argument(
        "--output", metavar="PATH", help="folder or .gguf file to make (default: beside MODEL)"
    )
    group.add_argument(
        "--target-weight-format",
        metavar="FORMAT",
        help="openvino: export the target of --target as well, beside the draft",
    )
    group.add_argument(
        "--no-check", action="store_true", help="do not compare the export with PyTorch"
    )


def run(args: argparse.Namespace) -> None:
    from fastdraft_hf._errors import FastDraftError, nearest

    words = [word for word in args.overrides if "=" not in word]
    direct = {
        "--weight-format": args.weight_format,
        "--output": args.output,
        "--target-weight-format": args.target_weight_format,
        "--no-check": args.no_check,
    }
    if not words:
        given = [option for option, value in direct.items() if value]
        if given:
            raise FastDraftError(
                f"{given[0]} belongs to: fastdraft export openvino|gguf MODEL; the formats of a "
                "run are export.openvino and export.gguf"
            )
        stage.run(args)
        return
    if words[0] not in FORMATS:
        raise FastDraftError(
            f"export: '{words[0]}' is neither {' nor '.join(FORMATS)}{nearest(words[0], FORMATS)}"
        )
    if len(words) != 2:
        raise FastDraftError(f"export {words[0]}: one model is needed, a folder or a Hub id")
    settings = [word for word in args.overrides if "=" in word]
    settings += [
        f"--{key.removeprefix('field_').replace('_', '-')}"
        for key, value in vars(args).items()
        if key.startswith("field_") and value is not None
    ]
    for option in ("config", "output_dir", "draft"):
        if getattr(args, option) is not None:
            settings.append(f"--{option.replace('_', '-')}")
    if settings:
        raise FastDraftError(
            f"export {words[0]} MODEL: {settings[0]} belongs to the stage of a run "
            "(fastdraft export --config RECIPE.yaml)"
        )
    _export(words[0], words[1], args)


def _export(kind: str, model: str, args: argparse.Namespace) -> None:
    """Export one model, say how it compares, and read acceptance where a target is given."""
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.draft.vocabulary import check_vocabulary
    from fastdraft_hf.export.gguf import GGUFType
    from fastdraft_hf.export.openvino import WeightFormat, require_openvino
    from fastdraft_hf.stages import exporting
    from fastdraft_hf.target.resolve import resolve_target

    known = get_args(WeightFormat if kind == "openvino" else GGUFType)
    weight_format = args.weight_format or _DEFAULTS[kind]
    _check_format("--weight-format", weight_format, known)
    if args.target_weight_format is not None:
        if kind != "openvino" or args.target is None:
            raise FastDraftError("--target-weight-format: needs export openvino and --target")
        _check_format("--target-weight-format", args.target_weight_format, known)
    if kind == "openvino":
        require_openvino()
    base = Path.cwd() / model.rstrip("/").split("/")[-1].replace(":", "-")
    if Path(model).is_dir():
        base = Path(model).resolve()
    ending = f"-openvino-{weight_format}" if kind == "openvino" else f"-{weight_format}.gguf"
    output = Path(args.output) if args.output else base.with_name(base.name + ending)
    outputs = [output]
    if args.target_weight_format is not None:
        target_name = args.target.rstrip("/").split("/")[-1].replace(":", "-")
        outputs.append(output.with_name(f"{target_name}-openvino-{args.target_weight_format}"))
    for path in outputs:  # before an hour of work
        if path.exists():
            raise FastDraftError(f"{path} exists; move it away or give another --output")
    if args.dry_run:
        print("\n".join(map(str, outputs)))
        return
    _quiet()
    draft = _named("export", lambda: resolve_target(model)).path
    target = None if args.target is None else resolve_target(args.target).path
    if target is not None:
        check_vocabulary(target, draft)
    export: Callable[..., Any] = (
        exporting.checked_openvino if kind == "openvino" else exporting.checked_gguf
    )
    _report(output, export(draft, output, weight_format, check=not args.no_check))
    if target is None:
        return
    _acceptance(kind, weight_format, draft, output, target)
    if args.target_weight_format is not None:
        found = exporting.checked_openvino(
            target, outputs[1], args.target_weight_format, check=not args.no_check
        )
        _report(outputs[1], found)


def _acceptance(kind: str, weight_format: str, draft: Path, output: Path, target: Path) -> None:
    import functools

    from transformers import AutoTokenizer

    from fastdraft_hf.export.parity import read_gguf
    from fastdraft_hf.recipe import resolve_device
    from fastdraft_hf.stages import exporting
    from fastdraft_hf.target.resolve import stop_ids

    if kind == "openvino":
        name, load = "OpenVINO", functools.partial(exporting.load_openvino, output)
    else:
        name, load = "GGUF", functools.partial(read_gguf, draft, output)
    reading = exporting.read_acceptance(
        target,
        {
            "PyTorch": functools.partial(exporting.load_pytorch, draft),
            f"{name} {weight_format}": load,
        },
        ends=stop_ids(target, AutoTokenizer.from_pretrained(target)),
        device=resolve_device("auto"),
    )
    print("\n".join(reading.lines()), flush=True)


def _report(output: Path, found: Any) -> None:
    files = [output] if output.is_file() else list(output.glob("*"))
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{output}: {size:,.1f} MB")
    for line in ["not compared with PyTorch"] if found is None else found.lines():
        print(line)


def _check_format(option: str, value: str, known: tuple[str, ...]) -> None:
    from fastdraft_hf._errors import FastDraftError, nearest

    if value not in known:
        raise FastDraftError(
            f"{option}: '{value}' is not one of {', '.join(known)}{nearest(value, known)}"
        )


def _named(name: str, find: Callable[[], Any]) -> Any:
    """Call ``find``; its error is about this command's model and no recipe's target."""
    from fastdraft_hf._errors import FastDraftError

    try:
        return find()
    except FastDraftError as error:
        raise FastDraftError(f"{name}: {str(error).removeprefix('target: ')}") from error


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
