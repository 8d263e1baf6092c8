"""The stages of a run, registered in the order they run."""

from __future__ import annotations

from fastdraft_hf.stages import (
    bench,
    card,
    design,
    evaluate,
    export,
    generate,
    logits,
    reduced_vocabulary,
    report,
    train,
)
from fastdraft_hf.stages.runner import Stage, register
from fastdraft_hf.train.section import TrainingSection


def _unless_generated(section: TrainingSection | None) -> tuple[str, ...]:
    """Return the stage that writes text, where a training stage reads none of it."""
    sources = [] if section is None else section.sources
    return () if any(source.kind == "generated" for source in sources) else ("generate",)


_DRAFTS = ("design", "pretrain", "continue", "align")

register("design", Stage(design.run, lambda r: r.design, (), "design"))
register(
    "generate",
    Stage(
        generate.run,
        lambda r: r.generate,
        (),
        "generate",
        parallel=True,
        lacks=generate.lacks_rows,
        keeps=generate.unchanged,
    ),
)
register(
    "logits",
    Stage(
        logits.run,
        lambda r: r.logits,
        ("generate",),
        "logits",
        parallel=True,
        follows=("generate",),
        lacks=logits.lacks_rows,
    ),
)
register(
    "pretrain",
    Stage(
        train.pretrain,
        lambda r: r.pretrain,
        ("design", "generate"),
        "pretrain",
        parallel=True,
        leaves_out=lambda r: _unless_generated(r.pretrain),
    ),
)
register(
    "continue",
    Stage(
        train.continue_pretrain,
        lambda r: r.continue_,
        ("design", "generate", "pretrain"),
        "continue",
        parallel=True,
        leaves_out=lambda r: _unless_generated(r.continue_),
    ),
)
register(
    "align",
    Stage(
        train.align, lambda r: r.align, ("generate", "logits", *_DRAFTS[:3]), "align", parallel=True
    ),
)
register(
    "reduced_vocabulary",
    Stage(
        reduced_vocabulary.run, lambda r: r.reduced_vocabulary, ("generate", *_DRAFTS), "reduced"
    ),
)
register(
    "export", Stage(export.run, lambda r: r.export, (*_DRAFTS, "reduced_vocabulary"), "export")
)
register("evaluate", Stage(evaluate.run, lambda r: r.evaluate, _DRAFTS, "evaluate", parallel=True))
register(
    "bench",
    Stage(bench.run, lambda r: r.bench, (*_DRAFTS, "reduced_vocabulary", "export"), "bench"),
)
register("card", Stage(card.run, lambda r: r.card, (*_DRAFTS, "evaluate", "bench"), "draft"))
register(
    "report",
    Stage(report.run, lambda r: r.card, ("generate", *_DRAFTS, "evaluate", "bench"), "report"),
)
