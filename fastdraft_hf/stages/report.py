"""Stage report: figures, ``report.html``, and the same in a few lines on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastdraft_hf.stages.runner import STAGES, Run


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write the report and print where it is."""
    import yaml

    from fastdraft_hf.eval.report import snippet, write_report
    from fastdraft_hf.eval.summary import (
        SPEED_NOTE,
        budget_sentence,
        comparison_rows,
        memory_rows,
        read_summary,
        speed_rows,
        stage_rows,
        verdict,
    )
    from fastdraft_hf.eval.terminal import print_evaluation, print_table
    from fastdraft_hf.hub.card import describe_machine
    from fastdraft_hf.stages.provenance import machine

    summary = read_summary({name: run.stage_folder(name) for name in STAGES})
    draft = run.stage_folder("card")
    card = draft / "README.md"
    further = budget_sentence(summary)
    target = str(run.target.path)
    write_report(
        summary,
        folder,
        title=f"A draft for {run.target.name}",
        machine=describe_machine(machine()),
        target=target,
        draft_location=str(draft),
        samples=_samples(run),
        resolved_recipe=yaml.safe_dump(run.recipe.resolved(), sort_keys=False),
        further=further,
        card=card.read_text(encoding="utf-8") if card.is_file() else "",
    )
    out = sys.stderr
    print("", file=out)
    if summary.evaluation is not None:
        print_evaluation(summary.evaluation)
    if summary.bench is not None:
        print("", file=out)
        print_table(speed_rows(summary.bench))
        if summary.bench.get("best"):
            print(f"\n{SPEED_NOTE}", file=out)
        for rows in (comparison_rows(summary.bench), memory_rows(summary.bench)):
            if rows:
                print("", file=out)
                print_table(rows)
    print(f"\n{verdict(summary.bench)}\n", file=out)
    print_table(stage_rows(summary.provenance))
    print(f"\n{further}", file=out)
    print(f"\nreport: {run.stage_folder('report') / 'report.html'}", file=out)
    print(f"draft:  {draft}\n\nfrom transformers import AutoModelForCausalLM", file=out)
    print(snippet(target, str(draft)), file=out)
    return {"figures": sorted(p.name for p in folder.glob("*.png"))}


def _samples(run: Run) -> list[tuple[str, str]]:
    """Return one sampled and one greedy answer of every task set, drafted tokens marked."""
    from transformers import AutoTokenizer

    from fastdraft_hf.eval import evaluate
    from fastdraft_hf.eval.journal import Journal
    from fastdraft_hf.eval.report import accepted_pieces, marked_sample

    path = evaluate.save_path(run.stage_folder("evaluate"))
    if not path.exists():
        return []
    tokenizer = AutoTokenizer.from_pretrained(run.target.path)
    journal = Journal(path)
    samples = []
    config = run.recipe.evaluate
    # The first γ and temperature, as everywhere where one figure stands for all.
    settings = {
        kind: next(s for s in evaluate.settings_of(config) if s.run == kind)
        for kind in (evaluate.GREEDY, evaluate.SAMPLED)
    }
    for task in config.tasks:
        for kind, setting in settings.items():
            first = setting.prefix(task)
            record = next((r for key, r in journal.items() if key.startswith(first)), None)
            if record is not None:
                counts = f"{record.accepted} of {record.drafted} drafted tokens accepted"
                heading = f"{task} {record.key}, {kind}: {counts}"
                pieces = accepted_pieces(record.tokens, record.rounds, tokenizer.decode)
                samples.append((heading, marked_sample(pieces)))
    return samples
