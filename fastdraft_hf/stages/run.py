"""A run: a recipe, the folder that its stages fill, its lock, and the target."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.eval.config import BenchConfig, EvaluateConfig
from fastdraft_hf.hub.folder import FOLDERS
from fastdraft_hf.recipe import Recipe
from fastdraft_hf.stages import provenance
from fastdraft_hf.target.resolve import Target, load_config, load_tokenizer, resolve_target

# The recipe that a run's folder was last filled by.
RECIPE = "recipe.yaml"
# In the folder of every stage: what it was made with, and how.
CONFIG, PROVENANCE = "config.yaml", "provenance.json"
# The number of a stage's runs and their time so far, in its partial folder.
SESSIONS = "sessions.json"


@dataclass
class Run:
    """A recipe, its folder, and the target.

    Attributes:
        started: when this process began, by ``time.monotonic``.
        spent: seconds that earlier processes ran in the folder.
        dry: whether to look at no weights but their headers: to compare them takes seconds.
    """

    recipe: Recipe
    folder: Path
    _target: Target | None = field(default=None, repr=False)
    dry: bool = False
    started: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    left_out: Sequence[str] = ()  # stages that the target does not allow

    @property
    def target(self) -> Target:
        """The target; downloaded or converted on first use."""
        if self._target is None:
            self._target = resolve_target(self.recipe.target, self.recipe.target_revision)
        return self._target

    @property
    def target_weights(self) -> str | None:
        """A digest of a local target's weights, for `made` and `wanted`."""
        return None if self.dry else provenance.target_weights(self.recipe.target)

    def look_at_target(self) -> Target:
        """Return the target with its config and tokenizer; its weights may be missing."""
        if self._target is not None:
            return self._target
        # Not kept: a stage may still need the weights.
        return resolve_target(self.recipe.target, self.recipe.target_revision, weights=False)

    def chat_tokenizer(self) -> Any:
        """Return the target's tokenizer, whose chats are in the mode of the recipe."""
        return load_tokenizer(self.target.path, "target", self.recipe.chat_template_kwargs)

    def longest_prompt(self, config: EvaluateConfig | BenchConfig) -> int:
        """Return how many tokens a measured prompt may have; the target may read fewer."""
        target = load_config(self.target.path).get_text_config()
        reads = getattr(target, "max_position_embeddings", None) or sys.maxsize
        return min(config.max_prompt_tokens, max(1, reads - config.max_new_tokens))

    @property
    def folders(self) -> dict[str, Path]:
        """Every stage's folder by the stage's name, in the order of a run."""
        return {name: self.folder / folder for name, folder in FOLDERS.items()}

    def stage_folder(self, name: str) -> Path:
        return self.folders[name]

    def partial_folder(self, name: str) -> Path:
        """Return the folder that a stage works in until it is finished."""
        return self.folder / f".{FOLDERS[name]}.partial"

    def finished(self, name: str) -> bool:
        return (self.stage_folder(name) / PROVENANCE).exists()

    def latest_model(self, before: str | None = None) -> Path:
        """Return the folder of the newest draft: reduced, trained or designed.

        Args:
            before: only stages that come before this one count.

        Raises:
            FastDraftError: there is none yet.
        """
        makers = ["design", *self.recipe.training_stages()]
        if self.recipe.reduced_vocabulary is not None:
            makers.append("reduced_vocabulary")
        if before in makers:
            makers = makers[: makers.index(before)]
        newest = makers[-1]
        if not self.finished(newest):
            raise FastDraftError(
                f"stage {newest} is not finished in {self.folder}; run it first (fastdraft run)"
            )
        return self.stage_folder(newest)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, in the main process; a killed process releases it.

    Raises:
        FastDraftError: another run holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FastDraftError(f"another fastdraft process works in {folder}") from None

    on_main(acquire)
    try:
        yield
    finally:
        lock.release()
