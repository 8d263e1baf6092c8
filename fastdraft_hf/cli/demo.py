"""``fastdraft demo``: prompts answered with and without the draft, side by side.

Both sides run through our own loop, the first one with nothing drafted: the ratio of their speeds
is the draft's alone, and not what the loop's kernels bring.
"""

import argparse
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._ties import first_difference
from fastdraft_hf.data.prompts import chat_ids
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.bench import Models, Setting, load_engine
from fastdraft_hf.eval.metrics import acceptance_rate, block_efficiency, tokens_per_second
from fastdraft_hf.eval.prompts import EvaluationPrompt
from fastdraft_hf.eval.report import Pieces, accepted_pieces

SHIPPED = "SmolLM2-135M-Instruct-FastDraft"
# On a terminal narrower than this the answers stand below each other.
_TWO_COLUMNS = 100

# (code or chat, text). Code is continued as it is, and ends within a line: the line break and the
# indentation after it are one token of most vocabularies. None is from a held-out task set.
PROMPTS = (
    (
        "code",
        'class Account:\n    """A bank account that keeps its history."""\n\n'
        "    def __init__(self, owner):",
    ),
    (
        "code",
        "import argparse\nimport json\nfrom pathlib import Path\n\n\n"
        'def main():\n    parser = argparse.ArgumentParser(description="Merge JSON files")',
    ),
    ("chat", "Why is the sky blue during the day and red in the evening?"),
    ("chat", "Write a short letter to a neighbour who watered my plants while I was away."),
)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="what to answer (default: four prompts of the package)")
    add("--target", metavar="ID", default="embedded:smollm2-135m-instruct", help="id or folder")
    add("--draft", metavar="DIR", help="folder of a draft or run, or an id (default: shipped)")
    add("--engine", choices=("openvino", "transformers"), help="default: openvino if installed")
    add("--num-assistant-tokens", type=int, metavar="N", help="tokens drafted per round (γ)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (128)")


def run(args: argparse.Namespace) -> None:
    """Find and check both models, load them, and print what they write."""
    from fastdraft_hf.cli.run import quiet_libraries
    from fastdraft_hf.decode.settings import read_draft_tokens
    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
    from fastdraft_hf.export.openvino import cached_openvino, use_openvino
    from fastdraft_hf.hub.folder import chat_mode
    from fastdraft_hf.recipe import resolve_device
    from fastdraft_hf.target.resolve import load_tokenizer, resolve_target, stop_ids

    for key in ("max_new_tokens", "num_assistant_tokens"):
        if (value := getattr(args, key)) is not None and value < 1:
            raise FastDraftError(f"{key}: must be at least 1, got {value}")
    device = resolve_device("auto")
    draft = find_draft(args.draft)
    quiet_libraries()
    target = resolve_target(args.target).path
    openvino = use_openvino(args.engine, device, "--engine", target, draft)
    tokenizer = load_tokenizer(target, "--target", chat_mode(draft))
    check_vocabulary(Vocabulary.of_folder(target, "the target", tokenizer), draft, "draft")
    gamma = args.num_assistant_tokens or read_draft_tokens(draft) or 3  # the paper's
    hint = " (the first time, OpenVINO exports them)" if openvino else ""
    print(f"loading both models{hint} ...", file=sys.stderr, flush=True)
    models = Models(
        target=str(target),
        draft=str(draft),
        target_openvino=str(cached_openvino(target, "int8")) if openvino else "",
        draft_openvino=str(cached_openvino(draft, "int8")) if openvino else "",
        device=device,
        stop_ids=sorted(stop_ids(target, tokenizer)),
    )
    path = "ours-openvino" if openvino else "ours"
    sides = Setting(path), Setting(path, gamma)
    engine = load_engine(models, sides)
    how = "OpenVINO int8" if openvino else f"PyTorch on {device}"
    print(f"{how}, greedy, {gamma} tokens drafted per round (γ)", flush=True)
    prompts = PROMPTS if args.prompt is None else [("chat", args.prompt)]
    show(engine, sides, prompts, tokenizer, Console(highlight=False), args.max_new_tokens)


def find_draft(given: str | None) -> Path:
    """Return the draft's folder: the shipped one, that of a run, or of any model.

    Raises:
        FastDraftError: there is none; the message says how to get a draft.
    """
    from fastdraft_hf.target.resolve import resolve_target

    if given is None:
        shipped = Path(__file__).resolve().parents[2] / "model_cards" / SHIPPED
        if not (shipped / "config.json").is_file():
            raise FastDraftError(
                f"draft: only a clone of the repository has a draft (model_cards/{SHIPPED}), this "
                "installation has none; give --draft, for example the folder that `fastdraft pull` "
                "prints"
            )
        return shipped
    of_run = Path(given).expanduser() / "draft"  # stage card's folder
    return resolve_target(str(of_run) if of_run.is_dir() else given, key="draft").path


def show(
    engine: Any,
    sides: tuple[Setting, Setting],
    prompts: Sequence[tuple[str, str]],
    tokenizer: Any,
    console: Console,
    max_new_tokens: int,
) -> list[tuple[DecodingRecord, DecodingRecord]]:
    """Answer every prompt twice, greedily, and print both answers with their speeds.

    A terminal gets two columns with the accepted tokens marked, a file or a pipe plain text.
    The two sides run one after the other, because they would share the processor's cores.

    Args:
        engine: from `fastdraft_hf.eval.bench.load_engine`, with both sides.
        sides: without and with the draft.
        prompts: pairs ``("code" or "chat", text)``; chat prompts go through the chat template.

    Returns:
        For each prompt the records without and with the draft.
    """
    read = [
        EvaluationPrompt(
            "demo",
            "",
            chat_ids(tokenizer, text) if kind == "chat" else tuple(tokenizer(text)["input_ids"]),
        )
        for kind, text in prompts
    ]
    for side in sides:  # compilation and first allocations belong to neither side
        engine(side, max(read, key=lambda prompt: len(prompt.ids)), 16)
    found: list[tuple[DecodingRecord, DecodingRecord]] = []
    for prompt, (_, text) in zip(read, prompts, strict=True):
        console.out(f"\n--- prompt {len(found) + 1} of {len(prompts)}\n{visible(text).rstrip()}")
        answers = []
        for title, side in zip(("target alone", "with the draft"), sides, strict=True):
            record = engine(side, prompt, max_new_tokens)
            heading = (
                f"{title}: {tokens_per_second([record]):.1f} tokens/s, {record.new_tokens} tokens "
                f"in {record.target_passes} passes"
            )
            pieces = accepted_pieces(record.tokens, record.rounds, tokenizer.decode)
            answers.append((record, heading, pieces))
            if not console.is_terminal:
                plain = visible("".join(part for _, part in pieces)).rstrip()
                console.out(f"--- {heading}\n{plain}")
        if console.is_terminal:
            console.print(side_by_side(console, [answer[1:] for answer in answers]))
        found.append((answers[0][0], answers[1][0]))
        position = first_difference(*(record.tokens for record in found[-1]))
        agreement = (
            f"outputs identical ({found[-1][0].new_tokens} tokens)"
            if position is None
            else f"outputs differ from token {position + 1} on; `fastdraft evaluate` shows whether "
            "such tokens tie"
        )
        console.out(f"{_figures(found[-1:])}\n{agreement}")
    if len(found) > 1:
        console.out(f"\nall {len(found)} prompts: {_figures(found)}")
    console.out("\nOne run of each, no intervals: `fastdraft bench` measures with them.")
    return found


def _figures(found: Sequence[tuple[DecodingRecord, DecodingRecord]]) -> str:
    alone, assisted = zip(*found, strict=True)
    before, after = tokens_per_second(alone), tokens_per_second(assisted)
    return (
        f"acceptance rate {acceptance_rate(assisted):.2f}, {block_efficiency(assisted):.2f} tokens "
        f"per target pass; {before:.1f} tokens/s alone, {after:.1f} with the draft: "
        f"{after / max(before, 1e-12):.2f}x"
    )


def visible(text: str) -> str:
    """Return a text without control characters: a model's output must not steer the terminal."""
    shown = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    return "".join(shown).expandtabs(4)


def side_by_side(console: Console, answers: Sequence[tuple[str, Pieces]]) -> Columns:
    """Return headed answers in two columns, or below each other on a narrow terminal.

    Accepted tokens are green, or underlined where there are no colors.
    """
    width = console.width // 2 if console.width >= _TWO_COLUMNS else console.width
    style = "underline" if console.no_color else "green"
    panels = []
    for heading, pieces in answers:
        text = Text.assemble(*((visible(part), style if a else "") for a, part in pieces))
        text.rstrip()
        panels.append(Panel(text, title=Text(heading), title_align="left", width=width))
    return Columns(panels, padding=0)
