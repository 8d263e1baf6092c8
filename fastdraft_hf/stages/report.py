"""Stage report: figures, ``report.html``, and the same in a few lines on the terminal."""

import sys
from pathlib import Path
from typing import Any

import yaml

from fastdraft_hf.eval import summary as texts
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.report import Pieces, accepted_pieces, snippet, write_report
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import load_tokenizer


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write the report, and print its tables and where it is."""
    summary = texts.read_summary(run.folders)
    draft, target = run.stage_folder("card"), str(run.target.path)
    card = draft / "README.md"
    where = describe_machine(machine())
    write_report(
        summary,
        folder,
        samples=_samples(run),
        target=target,
        draft_location=str(draft),
        title=f"A draft for {run.target.name}",
        machine=where,
        recipe=yaml.safe_dump(run.recipe.resolved(), sort_keys=False),
        further=texts.budget_sentence(summary),
        card=card.read_text(encoding="utf-8") if card.is_file() else "",
    )
    for results, show in (
        (summary.evaluation, texts.print_evaluation),
        (summary.bench, texts.print_bench),
    ):
        if results is not None:
            print("", file=sys.stderr)
            show(results)
    print("", file=sys.stderr)
    texts.print_table(texts.stage_rows(summary.provenance))
    report = run.stage_folder("report") / "report.html"
    print(f"\nreport: {report}\ndraft:  {draft}\n", file=sys.stderr)
    print("from transformers import AutoModelForCausalLM", file=sys.stderr)
    print(snippet(target, str(draft)), "", sep="\n", file=sys.stderr)
    print(*texts.closing_sentences(summary, where), sep="\n", file=sys.stderr)
    return {"figures": sorted(p.name for p in folder.glob("*.png"))}


def _samples(run: Run) -> list[tuple[str, Pieces]]:
    """Return one greedy and one sampled answer of every task set, accepted tokens marked."""
    from fastdraft_hf.eval import evaluate

    path = run.stage_folder("evaluate") / evaluate.RECORDS
    if not path.exists():
        return []
    tokenizer = load_tokenizer(run.target.path, "target")
    records = Journal(path)
    samples: list[tuple[str, Pieces]] = []
    for task in run.recipe.evaluate.tasks:
        for kind in (evaluate.GREEDY, evaluate.SAMPLED):
            chosen = (
                r for label, r in records.items() if r.task == task and label.startswith(f"{kind}/")
            )
            if (record := next(chosen, None)) is not None:
                counts = f"{record.accepted} of {record.drafted} drafted tokens accepted"
                pieces = accepted_pieces(record.tokens, record.rounds, tokenizer.decode)
                heading = f"{task} {record.key}, {kind}: {counts}"
                samples.append((heading, pieces))
    return samples
