"""`fastdraft ship`: a run's draft as a folder of a repository, in bfloat16 and checked."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf._sequences import first_difference
from fastdraft_hf.decode.settings import read_draft_tokens
from fastdraft_hf.export.parity import PROMPTS
from fastdraft_hf.hub import folder as hub_folder
from fastdraft_hf.hub.files import RepoFile, check_files
from fastdraft_hf.hub.push import plan_push
from fastdraft_hf.hub.run_folder import RunFolder, find_run
from fastdraft_hf.stages import exporting
from fastdraft_hf.stages.provenance import describe

_NEW_TOKENS = 32


@dataclass(frozen=True)
class Shipped:
    """What was written.

    Attributes:
        folder: where to.
        files: what it holds.
        facts: as they stand in ``provenance.json``, under ``ship``.
    """

    folder: Path
    files: list[RepoFile]
    facts: dict[str, Any]

    def lines(self) -> list[str]:
        """Return the findings for a terminal."""
        size = sum(file.size for file in self.files) / 1e6
        weights = hub_folder.weights_size(self.files) / 1e6
        found = [
            f"{self.folder}: {len(self.files)} files, {size:.1f} MB, of them weights in "
            f"{hub_folder.DTYPE} {weights:.1f} MB"
        ]
        if "greedy_texts" not in self.facts:
            return [*found, "not checked against the target"]
        found.append(
            f"greedy text with it, through transformers: the target's own on "
            f"{self.facts['greedy_identical']} of {self.facts['greedy_texts']} prompts"
        )
        return [*found, *(note for note in (self.facts["note"],) if note)]


def ship(
    run: Path,
    output: Path,
    *,
    target: str | None = None,
    repo: str | None = None,
    max_megabytes: float = 25.0,
    overwrite: bool = False,
    check: bool = True,
) -> Shipped:
    """Write what `fastdraft push` would send into a folder, weights in bfloat16.

    Args:
        run: a run's folder, or a draft's.
        output: the folder to make.
        target: what the draft is checked with; by default the run's target.
        repo: what the card's snippets load the draft from; by default the last two parts of
            ``output``, which is right from the root of a repository.
        max_megabytes: largest size of the weights, in millions of bytes.
        overwrite: replace ``output``.
        check: let the target write greedy text with the rounded draft, and read what rounding
            cost in acceptance.

    Raises:
        FastDraftError: the draft is not finished, has no γ or is too large, something in its folder
            must not be published, ``output`` exists, or the text with the draft is not the target's
            own.
    """
    found = find_run(run)
    hub_folder.check_free(output, overwrite=overwrite)
    if found.draft is not None and found.draft.resolve() == output.resolve():
        raise FastDraftError(f"--to: {output} is the draft itself; give another folder")
    whole = output.resolve()
    location = repo or f"{whole.parent.name}/{whole.name}"
    plan_push(run, location)  # what is missing or unfit is said before any work
    assert found.draft is not None
    gamma = read_draft_tokens(found.draft)
    if gamma is None:
        raise FastDraftError(
            f"{found.draft}: its generation_config.json has no num_assistant_tokens, and "
            "transformers would draft 20 tokens a round; let `fastdraft card` assemble the draft"
        )
    given = (target or _target_of(found)) if check else None
    with tempfile.TemporaryDirectory(prefix="fastdraft-ship-") as scratch:
        cast = Path(scratch)
        types = hub_folder.cast_draft(found.draft, cast)
        files = [RepoFile(f.name, f) for f in sorted(cast.iterdir())]
        megabytes = hub_folder.weights_size(files) / 1e6
        if megabytes > max_megabytes:
            raise FastDraftError(
                f"--max-megabytes: the weights are {megabytes:.1f} MB in {hub_folder.DTYPE}, more "
                f"than {max_megabytes:g}"
            )
        facts: dict[str, Any] = {
            "num_assistant_tokens": gamma,
            "dtype": hub_folder.DTYPE,
            "cast_from": types,
            "draft_location": location,
            "note": "",
        }
        if given is not None:
            facts |= _check(given, found.draft, cast, gamma)
        if types != [hub_folder.DTYPE]:
            facts["note"] = _note(types, facts)
        record = {"stage": "ship", **describe(facts=facts)}
        (plan,) = plan_push(run, location, weights_note=facts["note"], records={"ship": record})
        ours = {file.path: file for file in files}
        chosen = [ours.get(file.path, file) for file in plan.files]
        from huggingface_hub import get_token

        check_files(chosen, get_token())
        hub_folder.write_files(chosen, output, overwrite=overwrite)
    return Shipped(output, [RepoFile(f.path, output / f.path) for f in chosen], facts)


def _target_of(found: RunFolder) -> str:
    """Return what the run's recipe or records name as the target."""
    import yaml

    recipe = found.run / "recipe.yaml" if found.run else None
    if recipe is not None and recipe.is_file():
        named = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("target")
        if named:
            return str(named)
    for record in reversed(found.summary.provenance.values()):
        if record.get("target"):
            return str(record["target"])
    raise FastDraftError(
        "--target: no record says whose draft this is, and it is checked with its target; give "
        "it, or --no-check"
    )


def _check(target: str, draft: Path, cast: Path, gamma: int) -> dict[str, Any]:
    """Return what the rounded draft gives with its target.

    Raises:
        FastDraftError: a greedy text is not the target's own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
    from fastdraft_hf.target.resolve import resolve_target, stop_ids

    path = resolve_target(target).path
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_vocabulary(Vocabulary.of_folder(path, "the target", tokenizer), draft)

    def as_it_lies() -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            cast, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        return model.eval()

    with Progress("checking with the target", len(PROMPTS) + 1, "steps") as progress:
        model = exporting.load_pytorch(path)
        facts = _greedy(model, as_it_lies(), tokenizer, gamma, progress)
        del model
        reading = exporting.read_acceptance(
            path,
            {"before": lambda: exporting.load_pytorch(draft), hub_folder.DTYPE: as_it_lies},
            ends=stop_ids(path, tokenizer),
            num_assistant_tokens=gamma,
        )
        progress.advance()
    return {**facts, "acceptance": reading.facts()}


def _greedy(
    target: Any, draft: Any, tokenizer: Any, gamma: int, progress: Progress
) -> dict[str, Any]:
    """Return on how many prompts stock assisted generation writes the target's own text.

    Raises:
        FastDraftError: it does not, and the target was not torn between two tokens.
    """
    from fastdraft_hf._ties import greedy_margin
    from fastdraft_hf.decode.assisted import decode

    identical, ties = 0, []
    for text in PROMPTS:
        ids = tokenizer(text)["input_ids"]
        given: dict[str, Any] = {
            "task": "ship",
            "key": text,
            "max_new_tokens": _NEW_TOKENS,
            "temperature": 0.0,
            "seed": 0,
        }
        alone = decode(target, ids, **given).tokens
        progress.advance()
        assisted = decode(target, ids, draft=draft, num_assistant_tokens=gamma, **given).tokens
        place = first_difference(alone, assisted)
        if place is None:
            identical += 1
            continue
        margin = greedy_margin(target, [*ids, *alone[:place]])
        if not margin.tie:
            raise FastDraftError(
                f"greedy text with the draft is not the target's own after '{text}': it parts at "
                f"token {place + 1}, where the target's margin is {margin.margin:.3g}; not shipped"
            )
        ties.append({"prompt": text, "token": place + 1, "margin": margin.margin})
    return {"greedy_texts": len(PROMPTS), "greedy_identical": identical, "greedy_ties": ties}


def _note(types: list[str], facts: dict[str, Any]) -> str:
    """Return what the card says about the rounding."""
    words = (
        f"The weights are stored in {hub_folder.DTYPE}; the figures below were measured with them "
        f"in {' and '.join(types)}."
    )
    reading = facts.get("acceptance")
    if reading is None:
        return f"{words} What the rounding costs in acceptance was not measured."
    before, after = (one["acceptance_rate"] for one in reading["drafts"])
    return (
        f"{words} Along {reading['texts']} texts of the target (γ = "
        f"{reading['num_assistant_tokens']}, T = {reading['temperature']:g}) the expected "
        f"acceptance rate is {before:.4f} before and {after:.4f} after the rounding."
    )
