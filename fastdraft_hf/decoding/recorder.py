"""From a run to records: what transformers, our loop or OpenVINO GenAI drafted and accepted.

The records of a run, `DecodingRecords`, give the columns that the metrics of
`fastdraft_hf.evaluation.modules` read, and are saved as files that ``datasets.load_dataset`` reads.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_file
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decoding.assisted import DraftPath, tell_rounds
from fastdraft_hf.decoding.records import DecodingRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whether a recorded call is running: stock assisted generation calls ``generate`` of the draft in
# every round, and a draft may be the target itself.
_running: ContextVar[bool] = ContextVar("running", default=False)


class DecodingRecords(list[DecodingRecord]):
    """Records of answers, in order."""

    def columns(self, by_round: bool = False) -> dict[str, list[Any]]:
        """Return what the metrics read, a value an answer.

        Args:
            by_round: lists of one value a round, for the configuration ``rounds`` of the
                acceptance rate.

        Returns:
            ``drafted``, ``accepted``, ``new_tokens`` and ``target_passes``; the first two alone
            with ``by_round``.

        Raises:
            ValueError: ``by_round``, and a record has totals only (OpenVINO GenAI).
        """
        if not by_round:
            names = ("drafted", "accepted", "new_tokens", "target_passes")
            return {name: [getattr(r, name) for r in self] for name in names}
        for record in self:
            if record.drafted and not record.rounds:
                raise ValueError(f"record {record.key}: {record.path} does not tell its rounds")
        return {
            "drafted": [[d for d, _ in r.rounds] for r in self],
            "accepted": [[a for _, a in r.rounds] for r in self],
        }

    def save(self, path: str | Path) -> None:
        """Write ``.jsonl`` or ``.parquet``, a row an answer, columns as `DecodingRecord`'s.

        The column ``new_tokens`` comes in addition, so that the metrics can be given columns of the
        file.

        Raises:
            ValueError: the name ends otherwise.
        """
        path = Path(path)
        kind = _kind(path)
        rows = [{**r.to_dict(), "new_tokens": r.new_tokens} for r in self]
        with atomic_file(path) as temporary:
            if kind == ".jsonl":
                text = "".join(json.dumps(row) + "\n" for row in rows)
                temporary.write_text(text, encoding="utf-8")
            else:
                _write_parquet(temporary, rows)

    @classmethod
    def load(cls, path: str | Path) -> DecodingRecords:
        """Read what `save` wrote.

        Raises:
            ValueError: the name ends neither in ``.jsonl`` nor in ``.parquet``.
        """
        path = Path(path)
        if _kind(path) == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        return cls(DecodingRecord.from_dict(_without_new_tokens(row)) for row in rows)


def _without_new_tokens(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "new_tokens"}


def _kind(path: Path) -> str:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path.name}: records are saved as .jsonl or .parquet")
    return path.suffix


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    # Lists that are empty in every row would be columns of nothing.
    lists = {
        "tokens": pyarrow.list_(pyarrow.int64()),
        "rounds": pyarrow.list_(pyarrow.list_(pyarrow.int64())),
    }
    found = pyarrow.Table.from_pylist(rows).schema
    schema = pyarrow.schema([(one.name, lists.get(one.name, one.type)) for one in found])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


@contextlib.contextmanager
def record_decoding(target: PreTrainedModel, *, task: str = "") -> Iterator[DecodingRecords]:
    """Collect a record of every answer that ``target.generate`` writes in the block.

    Stock assisted generation, `fastdraft_hf.assisted_decoding` with batches, and the target alone;
    PyTorch models and ``OVModelForCausalLM``. One call at a time. Of OpenVINO GenAI, whose
    pipelines are not Python objects, see `record_result`.

    A record's ``key`` is its number in the block. The seconds of a batch are shared out evenly
    over its rows, so that sums are wall clock. Alone, every token is one pass of the target, which
    does not hold for beam search.

    Example:
        >>> with fastdraft_hf.record_decoding(target) as records:
        ...     target.generate(**inputs, assistant_model=draft)
        >>> metric = evaluate.load(fastdraft_hf.metric_path("acceptance_rate"))
        >>> metric.compute(**records.columns())

    Args:
        target: the model whose ``generate`` is called; of a PEFT model, its base is watched.
        task: written into the records.

    Raises:
        FastDraftError: ``target`` has no ``generate`` of transformers.
    """
    model: Any = target.get_base_model() if hasattr(target, "get_base_model") else target
    if not hasattr(model, "_get_candidate_generator"):
        raise FastDraftError(
            f"record_decoding needs a model with transformers' generate, not "
            f"{type(target).__name__}; for OpenVINO GenAI see fastdraft_hf.record_result"
        )
    records = DecodingRecords()
    generate, nested = model.generate, "generate" in vars(model)

    def recording(*args: Any, **kwargs: Any) -> Any:
        if _running.get():
            return generate(*args, **kwargs)
        call = _Call(model, {**dict(zip(("inputs", "generation_config"), args)), **kwargs})
        token = _running.set(True)
        try:
            with tell_rounds(model, call.tell):
                start = time.perf_counter()
                output = generate(*args, **kwargs)
                seconds = time.perf_counter() - start
        finally:
            _running.reset(token)
        for record in call.records(output, seconds):
            record.task, record.key = task, str(len(records))
            records.append(record)
        return output

    model.generate = recording
    try:
        yield records
    finally:
        if nested:
            model.generate = generate
        else:
            del model.generate


class _Call:
    """One call of ``generate``: what it was given, and the rounds of every row."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.model, self.given = model, given
        self.path: DraftPath = "transformers"
        self.rounds: dict[int, list[tuple[int, int]]] = {}
        self.prompt = self._prompt_length()
        self.gamma = self._drafted_a_round()

    def tell(self, path: DraftPath, row: int, drafted: int, accepted: int) -> None:
        self.path = path
        self.rounds.setdefault(row, []).append((drafted, accepted))

    def records(self, output: Any, seconds: float) -> Iterator[DecodingRecord]:
        from fastdraft_hf.decoding.obstacles import is_openvino

        sequences = getattr(output, "sequences", output)[:, self.prompt :].tolist()
        openvino = is_openvino(self.model) or is_openvino(self.given.get("assistant_model"))
        sampling = bool(self._setting("do_sample"))
        temperature = self._setting("temperature")
        for row, written in enumerate(sequences):
            rounds = self.rounds.get(row, [])
            # Every round emits what it accepted and one token of the target's own.
            emitted = sum(accepted + 1 for _, accepted in rounds)
            tokens = written[:emitted] if self.rounds else self._until_the_end(written)
            longest = max((drafted for drafted, _ in rounds), default=0)
            yield DecodingRecord(
                path="ours-openvino" if openvino else self.path,
                task="",
                key="",
                temperature=(1.0 if temperature is None else temperature) if sampling else 0.0,
                num_assistant_tokens=(self.gamma or longest) if self.rounds else 0,
                tokens=tokens,
                seconds=seconds / len(sequences),
                target_passes=len(rounds) if self.rounds else len(tokens),
                drafted=sum(drafted for drafted, _ in rounds),
                accepted=sum(accepted for _, accepted in rounds),
                rounds=rounds,
            )

    def _prompt_length(self) -> int:
        """Return how many leading ids of the output were not written by this call."""
        if self.model.config.is_encoder_decoder:
            ids = self.given.get("decoder_input_ids")
            return 1 if ids is None else int(ids.shape[-1])
        ids = self.given.get("inputs")
        ids = self.given.get("input_ids") if ids is None else ids
        if ids is not None:
            return int(ids.shape[-1])
        # Without a prompt there is a token that begins text; with embeddings there are no ids.
        return 0 if self.given.get("inputs_embeds") is not None else 1

    def _drafted_a_round(self) -> int:
        """Return γ before the call: the schedule ``heuristic`` writes back another."""
        draft = self.given.get("assistant_model")
        if draft is None:
            return 0
        from fastdraft_hf.decoding.speculative import drafting_of

        return drafting_of(draft).num_assistant_tokens

    def _setting(self, name: str) -> Any:
        configs = (self.given.get("generation_config"), self.model.generation_config)
        values = (self.given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def _until_the_end(self, written: list[int]) -> list[int]:
        """Return a row of a batch without its padding."""
        found = self._setting("eos_token_id")
        ends = set(found) if isinstance(found, Iterable) else {found}
        place = next((n for n, token in enumerate(written) if token in ends), len(written))
        tokens = written[: place + 1]
        pad = self._setting("pad_token_id")
        while len(tokens) > 1 and tokens[-1] == pad and pad not in ends:
            tokens.pop()
        return tokens


def record_result(
    result: Any, num_assistant_tokens: int, *, task: str = "", key: str = ""
) -> DecodingRecord:
    """Return the record of what an OpenVINO GenAI pipeline returned.

    ``LLMPipeline.generate`` returns such a result for a list of prompts or for token ids; for a
    plain string it returns the text alone. GenAI tells the totals of a call and not its rounds, so
    a call with several prompts gives one record of them all.

    Example:
        >>> result = pipeline.generate(["def add(a, b):"], max_new_tokens=64)
        >>> records = DecodingRecords([fastdraft_hf.record_result(result, 3)])

    Args:
        result: ``DecodedResults`` (the number of tokens is known, their ids are not) or
            ``EncodedResults``.
        num_assistant_tokens: γ of the call; a pipeline without a draft has 0 whatever is given.
        task, key: written into the record.

    Raises:
        FastDraftError: this is not such a result.
    """
    metrics = getattr(result, "perf_metrics", None)
    if metrics is None:
        raise FastDraftError(
            f"record_result needs what LLMPipeline.generate returns for a list of prompts or for "
            f"token ids, not {type(result).__name__}"
        )
    ids = list(getattr(result, "tokens", []))
    counted = sum(map(len, ids)) or metrics.get_num_generated_tokens()
    drafting = result.extended_perf_metrics
    drafted = accepted = 0
    if drafting is not None:
        drafted, accepted = drafting.get_num_draft_tokens(), drafting.get_num_accepted_tokens()
    return DecodingRecord(
        path="openvino",
        task=task,
        key=key,
        temperature=0.0,
        num_assistant_tokens=num_assistant_tokens if drafting is not None else 0,
        tokens=list(ids[0]) if len(ids) == 1 else [],
        seconds=metrics.get_generate_duration().mean / 1000,
        # Every pass of the target gives one token of its own beside the accepted ones.
        target_passes=max(1, counted - accepted),
        drafted=drafted,
        accepted=accepted,
        counted_tokens=counted,
    )
