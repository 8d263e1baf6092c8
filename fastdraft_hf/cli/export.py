"""``fastdraft export openvino|gguf MODEL``: a draft or a target for other engines."""

import argparse
from pathlib import Path
from typing import get_args


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    from fastdraft_hf.export.gguf import GGUFType
    from fastdraft_hf.export.openvino import WeightFormat

    parser.description = (
        "Export a draft or a target for OpenVINO or llama.cpp, compared with PyTorch. In a run, "
        "stage export does this: fastdraft run RECIPE --stages export."
    )
    formats = parser.add_subparsers(dest="format", metavar="openvino|gguf", required=True)
    for format, forms, default in (("openvino", WeightFormat, "int8"), ("gguf", GGUFType, "f16")):
        add = formats.add_parser(format).add_argument
        add("model", metavar="MODEL", help="model id on the Hub, or a folder")
        add(
            "--weight-format",
            choices=get_args(forms),
            default=default,
            help="how weights are stored (default: %(default)s)",
        )
        add("--output", metavar="PATH", help="folder or .gguf file (default: beside MODEL)")
        add("--target", metavar="ID", help="the draft's target: measure what acceptance it costs")
        add("--no-check", action="store_true", help="do not compare the export with PyTorch")


def run(args: argparse.Namespace) -> None:
    """Check everything, export, and print how the export compares."""
    from fastdraft_hf._atomic import room_to_write
    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli.run import quiet_libraries
    from fastdraft_hf.draft.reduced_vocabulary import load_draft
    from fastdraft_hf.draft.vocabulary import check_vocabulary
    from fastdraft_hf.export.openvino import openvino_obstacle, require_openvino
    from fastdraft_hf.export.parity import checked_export
    from fastdraft_hf.recipe import resolve_device
    from fastdraft_hf.stages.export import acceptance_lines, load_exported, read_acceptance
    from fastdraft_hf.target.resolve import folder_name, resolve_target

    openvino, form = args.format == "openvino", args.weight_format
    if not openvino and args.output and not args.output.endswith(".gguf"):
        raise FastDraftError(f"--output: must end in .gguf, got {args.output}")
    if openvino:
        require_openvino()
    base = Path(args.model).resolve()
    if not base.is_dir():
        base = Path.cwd() / folder_name(args.model)
    ending = f"-openvino-{form}" if openvino else f"-{form}.gguf"
    output = Path(args.output) if args.output else base.with_name(base.name + ending)
    if output.exists():  # before an hour of work
        raise FastDraftError(f"{output} exists; move it away or give another --output")
    quiet_libraries()
    draft = resolve_target(args.model, key="export").path
    if openvino and (obstacle := openvino_obstacle(draft)) is not None:
        raise FastDraftError(f"{args.model}: {obstacle}")
    target = None if args.target is None else resolve_target(args.target).path
    if target is not None:
        check_vocabulary(target, draft)
    with room_to_write(output.parent):
        found = checked_export(draft, output, form, check=not args.no_check)
    files = [output] if output.is_file() else list(output.glob("*"))
    print(f"{output}: {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")
    print(*(["not compared with PyTorch"] if found is None else found.lines()), sep="\n")
    if target is None:
        return
    forms = {
        "PyTorch": lambda: load_draft(draft, dtype="float32"),
        f"{'OpenVINO' if openvino else 'GGUF'} {form}": lambda: load_exported(draft, output),
    }
    reading = read_acceptance(target, forms, device=resolve_device("auto"))
    print(*acceptance_lines(reading), sep="\n")
