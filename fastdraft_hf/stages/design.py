"""Stage design: the untrained draft, with the target's tokenizer."""

from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.build import adopt, build, save_draft
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.draft.families import count_parameters, read_parameters, text_config
from fastdraft_hf.draft.reduced_vocabulary import (
    check_token_ids,
    read_reduced_vocabulary,
    write_reduced_vocabulary,
)
from fastdraft_hf.hub.folder import earlier_training
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import load_config


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write a draft that ``from_pretrained`` loads: a new one, or ``design.draft``."""
    design = run.recipe.design
    if design.draft is None:
        draft, facts = build(run.target.path, design, run.recipe.seed)
        save_draft(draft, folder)
        return facts
    source = Path(design.draft)
    draft, facts = adopt(run.target.path, source, resize=design.resize)
    head = read_reduced_vocabulary(source)
    if head is not None:  # it stays reduced until it is trained
        check_token_ids(head, draft.get_input_embeddings().weight.shape[0])
        write_reduced_vocabulary(folder, head)
    save_draft(draft, folder)
    earlier = earlier_training(source)
    return facts if earlier is None else {**facts, "earlier": earlier}


def preview(run: Run) -> str:
    """Return a line about the draft that would be designed, from the target's config alone."""
    try:
        folder = run.look_at_target().path
    except FastDraftError as error:  # not downloaded yet, and the Hub is out of reach
        return f"draft: its size follows from the target's config ({error})"
    target = text_config(load_config(folder, "target"))
    draft = design_draft(target, run.recipe.design)
    parameters, read = count_parameters(draft), read_parameters(draft)
    return (
        f"draft: {draft.num_hidden_layers} layers of width {draft.hidden_size:,}, feed-forward "
        f"{draft.intermediate_size:,}; {parameters:,} parameters, "
        f"{parameters / count_parameters(target):.3f} of the target's; {read:,} read per token, "
        f"{read / read_parameters(target):.3f} of the target's"
    )
