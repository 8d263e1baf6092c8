"""``fastdraft export openvino|gguf MODEL``: a draft or a target for other engines."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

_DEFAULTS = {"openvino": "int8", "gguf": "f16"}


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Export a draft or a target for OpenVINO or llama.cpp, compared with PyTorch. In a run, "
        "stage export does this: fastdraft run RECIPE --stages export."
    )
    add = parser.add_argument
    add("format", choices=tuple(_DEFAULTS), help="engine to export for")
    add("model", metavar="MODEL", help="model id on the Hub, or a folder")
    add(
        "--weight-format",
        metavar="FORMAT",
        help="openvino: fp32, fp16, int8, int4 (default: int8); gguf: f32, f16, bf16, q8_0 "
        "(default: f16)",
    )
    add("--output", metavar="PATH", help="folder or .gguf file to make (default: beside MODEL)")
    add("--target", metavar="ID", help="the draft's target: also measure what acceptance it costs")
    add(
        "--target-weight-format",
        metavar="FORMAT",
        help="openvino: also export the target of --target, beside the draft",
    )
    add("--no-check", action="store_true", help="do not compare the export with PyTorch")
    add("--dry-run", action="store_true", help="print what would be made")


def run(args: argparse.Namespace) -> None:
    """Check everything, export, and print how the export compares."""
    from typing import get_args

    from fastdraft_hf._errors import FastDraftError
    from fastdraft_hf.cli.run import quiet_libraries
    from fastdraft_hf.draft.vocabulary import check_vocabulary
    from fastdraft_hf.export.gguf import GGUFType
    from fastdraft_hf.export.openvino import WeightFormat, require_openvino
    from fastdraft_hf.export.parity import checked_export
    from fastdraft_hf.target.resolve import resolve_target

    openvino = args.format == "openvino"
    known = get_args(WeightFormat if openvino else GGUFType)
    form = args.weight_format or _DEFAULTS[args.format]
    _check_format("--weight-format", form, known)
    if args.target_weight_format is not None:
        if not openvino or args.target is None:
            raise FastDraftError("--target-weight-format: needs export openvino and --target")
        _check_format("--target-weight-format", args.target_weight_format, known)
    if not openvino and args.output and not args.output.endswith(".gguf"):
        raise FastDraftError(f"--output: must end in .gguf, got {args.output}")
    if openvino:
        require_openvino()
    base = (
        Path(args.model).resolve() if Path(args.model).is_dir() else Path.cwd() / _name(args.model)
    )
    ending = f"-openvino-{form}" if openvino else f"-{form}.gguf"
    output = Path(args.output) if args.output else base.with_name(base.name + ending)
    jobs = [(args.model, output, form)]
    if args.target_weight_format is not None:
        beside = f"{_name(args.target)}-openvino-{args.target_weight_format}"
        jobs.append((args.target, output.with_name(beside), args.target_weight_format))
    for _, path, _ in jobs:  # before an hour of work
        if path.exists():
            raise FastDraftError(f"{path} exists; move it away or give another --output")
    if args.dry_run:
        print("\n".join(str(path) for _, path, _ in jobs))
        return
    quiet_libraries()
    draft = resolve_target(args.model, key="export").path
    target = None if args.target is None else resolve_target(args.target).path
    if target is not None:
        check_vocabulary(target, draft)
    _report(output, checked_export(draft, output, form, check=not args.no_check))
    if target is None:
        return
    _acceptance(f"{'OpenVINO' if openvino else 'GGUF'} {form}", draft, output, target)
    for _, path, target_form in jobs[1:]:
        _report(path, checked_export(target, path, target_form, check=not args.no_check))


def _acceptance(name: str, draft: Path, output: Path, target: Path) -> None:
    from fastdraft_hf.draft.reduced_vocabulary import load_draft
    from fastdraft_hf.recipe import resolve_device
    from fastdraft_hf.stages.export import acceptance_lines, load_exported, read_acceptance

    reading = read_acceptance(
        target,
        {
            "PyTorch": functools.partial(load_draft, draft, dtype="float32"),
            name: functools.partial(load_exported, draft, output),
        },
        device=resolve_device("auto"),
    )
    print("\n".join(acceptance_lines(reading)), flush=True)


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


def _name(model: str) -> str:
    return model.rstrip("/").split("/")[-1].replace(":", "-")
