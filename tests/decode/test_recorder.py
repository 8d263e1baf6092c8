"""The recorder: a record of every answer, whatever wrote it, that adds up to what was emitted."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_helpers import padded, write
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM

import fastdraft_hf
from fastdraft_hf.decode.assisted import decode, record_decoding, record_rounds
from fastdraft_hf.decode.records import DecodingRecord, DecodingRecords
from fastdraft_hf.decode.settings import set_draft_length
from fastdraft_hf.eval.metrics import acceptance_rate

TinyModel = Callable[..., LlamaForCausalLM]
PROMPTS = st.lists(st.integers(3, 287), min_size=1, max_size=12)
GAMMAS = st.integers(1, 5)


def stock(target: Any, prompt: list[int], draft: Any, gamma: int = 3, **given: Any) -> Any:
    set_draft_length(draft.generation_config, gamma)
    ids = torch.tensor([prompt])
    fields = {"max_new_tokens": 12, "do_sample": False, **given}
    return target.generate(
        ids, attention_mask=torch.ones_like(ids), assistant_model=draft, **fields
    )


def check_rounds(record: DecodingRecord, gamma: int) -> None:
    """Every pass of the target emits what it accepted and one token of its own."""
    assert sum(accepted + 1 for _, accepted in record.rounds) == len(record.tokens)
    assert record.target_passes == len(record.rounds)
    assert all(0 <= accepted <= drafted <= gamma for drafted, accepted in record.rounds)
    assert record.drafted == sum(drafted for drafted, _ in record.rounds)
    assert record.accepted == sum(accepted for _, accepted in record.rounds)
    assert record.num_assistant_tokens == gamma


@given(st.lists(PROMPTS, min_size=1, max_size=3), GAMMAS)
@settings(max_examples=15)
def test_stock_and_ours_give_the_same_greedy_records(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM, prompts: list[list[int]], gamma: int
) -> None:
    with record_decoding(target, task="t") as theirs:
        for prompt in prompts:
            stock(target, prompt, neighbour, gamma)
    with record_decoding(target, task="t") as ours:
        for prompt in prompts:
            write(target, [prompt], neighbour, gamma)
    assert {r.path for r in theirs} == {"transformers"}
    assert {r.path for r in ours} == {"ours"}
    assert theirs.columns() == ours.columns()
    assert [r.rounds for r in theirs] == [r.rounds for r in ours]
    for n, (prompt, record) in enumerate(zip(prompts, theirs, strict=True)):
        assert record.tokens == write(target, [prompt])[0, len(prompt) :].tolist() == ours[n].tokens
        assert (record.task, record.key, record.temperature) == ("t", str(n), 0)
        check_rounds(record, gamma)
        given: dict[str, Any] = {"task": "t", "key": str(n), "num_assistant_tokens": gamma}
        same = decode(target, prompt, max_new_tokens=12, draft=neighbour, **given)
        assert 0 < same.first_token_seconds < same.seconds  # type: ignore[operator]
        # Times differ, and only decode() looks for the first token.
        same.seconds, same.first_token_seconds = record.seconds, None
        assert same == record


def test_the_neighbour_is_accepted_in_part(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    """What keeps the test above from comparing drafts that are never or always accepted."""
    with record_decoding(target) as records:
        for n in range(1, 20):
            stock(target, [3 * n, 7], neighbour)
    assert 0.02 < acceptance_rate(records) < 0.98


@given(PROMPTS, GAMMAS, st.floats(0.3, 2), st.integers(0, 99))
@settings(max_examples=15)
def test_sampled_rounds_add_up_and_a_seed_decides_them(
    target: LlamaForCausalLM,
    neighbour: LlamaForCausalLM,
    prompt: list[int],
    gamma: int,
    temperature: float,
    seed: int,
) -> None:
    fields: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_new_tokens": 12}
    fields |= {"draft": neighbour, "num_assistant_tokens": gamma}
    first, again = (decode(target, prompt, **fields) for _ in range(2))
    check_rounds(first, gamma)
    assert (again.tokens, again.rounds, again.temperature) == (
        first.tokens,
        first.rounds,
        temperature,
    )


@pytest.mark.parametrize(
    ("path", "gamma", "drafts"),
    [("transformers", 0, False), ("ours", 3, True), ("ours", 0, True)]
    + [("prompt-lookup", gamma, False) for gamma in (1, 3, 5)],
)
def test_every_path_writes_what_the_target_writes(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM, path: Any, gamma: int, drafts: bool
) -> None:
    for prompt in ([40, 41, 42, 43] * 4, [7, 7], [100, 9] * 3):
        given = {"draft": neighbour if drafts else None, "path": path}
        record = decode(target, prompt, max_new_tokens=12, num_assistant_tokens=gamma, **given)
        # Stock prompt lookup copies past the end.
        assert record.tokens == write(target, [prompt])[0, len(prompt) :].tolist()
        assert record.first_token_seconds is not None
        assert 0 < record.first_token_seconds < record.seconds
        assert (record.path, record.num_assistant_tokens) == (path, gamma)
        assert all(0 <= accepted <= drafted <= gamma for drafted, accepted in record.rounds)
        passes = len(record.rounds) if gamma or drafts else len(record.tokens)
        assert record.target_passes == passes


@pytest.mark.parametrize("assisted", [True, False], ids=["assisted", "alone"])
def test_a_batch_gives_a_record_a_row_as_if_each_were_alone(
    tiny_model: TinyModel, neighbour: LlamaForCausalLM, assisted: bool
) -> None:
    target = tiny_model(seed=0)
    target.generation_config.pad_token_id = 0
    prompts = [[40, 41, 42], [100], [70, 33, 250, 9], [5, 6]]
    # A token of one row ends the text, so that rows are of different lengths.
    first = write(target, [prompts[0]])[0, 3:].tolist()
    target.generation_config.eos_token_id = first[5]
    draft = neighbour if assisted else None
    with record_decoding(target) as single:
        for prompt in prompts:
            write(target, [prompt], draft)
    ids, mask = padded(prompts)
    with record_decoding(target) as batch:
        write(target, ids, draft, attention_mask=mask)
    assert [r.tokens for r in batch] == [r.tokens for r in single]
    assert batch.columns() == single.columns()
    assert [r.rounds for r in batch] == [r.rounds for r in single]
    assert [r.key for r in batch] == ["0", "1", "2", "3"]
    assert len({len(r.tokens) for r in batch}) > 1
    assert len({r.seconds for r in batch}) == 1  # the call's, shared out


def test_prompts_and_settings_are_found_however_they_are_given(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    ids = torch.tensor([[40, 41, 42]])
    config = GenerationConfig(
        do_sample=True, temperature=0.5, max_new_tokens=6, min_new_tokens=6, pad_token_id=0
    )
    set_draft_length(neighbour.generation_config, 2)
    with record_decoding(target) as records:
        target.generate(ids, config, assistant_model=neighbour)
        target.generate(input_ids=ids, generation_config=config, assistant_model=neighbour)
        target.generate(inputs=ids, do_sample=True, max_new_tokens=6, min_new_tokens=6)
        output = target.generate(
            input_ids=ids, max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True
        )
        target.generate(
            inputs_embeds=target.get_input_embeddings()(ids), max_new_tokens=6, min_new_tokens=6
        )
    assert output.sequences.shape == (1, 9)  # what generate returns is handed on
    assert [r.new_tokens for r in records] == [6] * 5
    assert [r.temperature for r in records] == [0.5, 0.5, 1.0, 0, 0]
    assert [r.num_assistant_tokens for r in records] == [2, 2, 0, 0, 0]
    assert records[3].tokens == records[4].tokens == output.sequences[0, 3:].tolist()


def test_a_target_that_drafts_for_itself_is_one_answer(tiny_model: TinyModel) -> None:
    target = tiny_model(seed=0)
    with record_decoding(target) as records:
        stock(target, [40, 41], target, max_new_tokens=8)
    assert [r.new_tokens for r in records] == [len(records[0].tokens)]
    assert records[0].accepted > 0


def test_recorders_nest_and_leave_the_target_as_it_was(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    before = set(vars(target))
    with record_rounds(target) as rounds, record_decoding(target) as outer:
        with record_decoding(target) as inner:
            stock(target, [40, 41], neighbour)
            write(target, [[40, 41]], neighbour)
        write(target, [[50]], neighbour)
    assert [len(inner), len(outer)] == [2, 3]
    assert rounds == [one for record in outer for one in record.rounds]
    assert set(vars(target)) == before
    write(target, [[50]], neighbour)
    assert len(outer) == 3

    def fail() -> None:
        with record_decoding(target) as records:
            with pytest.raises(ValueError, match=r".+"):
                target.generate(torch.tensor([[40]]), max_new_tokens=-1)
            assert records == []
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert set(vars(target)) == before


def test_a_call_from_another_thread_is_recorded(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    """As with ``TextIteratorStreamer``, whose text is read while ``generate`` runs elsewhere."""
    with record_decoding(target) as records:
        thread = threading.Thread(target=write, args=(target, [[40, 41]], neighbour))
        thread.start()
        thread.join()
    assert len(records[0].rounds) == records[0].target_passes > 0


def test_a_peft_model_is_recorded(tiny_model: TinyModel, neighbour: LlamaForCausalLM) -> None:
    import peft

    model = peft.get_peft_model(tiny_model(seed=0), peft.LoraConfig(task_type="CAUSAL_LM"))
    ids = torch.tensor([[40, 41]])
    with record_decoding(model) as records:
        model.generate(input_ids=ids, assistant_model=neighbour, max_new_tokens=6)
    assert records[0].target_passes == len(records[0].rounds) > 0


def test_what_cannot_be_recorded_is_said() -> None:
    class LLMPipeline:
        def generate(self) -> None: ...

    with pytest.raises(fastdraft_hf.FastDraftError, match=r"not LLMPipeline; .*record_result"):
        record_decoding(LLMPipeline()).__enter__()  # type: ignore[arg-type]
    with pytest.raises(fastdraft_hf.FastDraftError, match=r"list of prompts.* not str"):
        fastdraft_hf.record_result("def add(a, b):", 3)


def test_saved_records_are_a_dataset(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM, tmp_path: Path
) -> None:
    import datasets

    with record_decoding(target) as alone:
        write(target, [[40, 41]])
    with record_decoding(target) as records:
        for prompt in ([40, 41], [100], [7, 8, 9]):
            write(target, [prompt], neighbour)
    for some in (alone, records, DecodingRecords([*records, *alone])):
        path = tmp_path / f"{len(some)}.jsonl"
        some.save(path)
        assert DecodingRecords.load(path) == some
        rows = datasets.load_dataset(
            "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert {column: rows[column][:] for column in some.columns()} == some.columns()
        assert rows["tokens"][:] == [r.tokens for r in some]
    # Alone, every token is a pass of the target.
    (record,) = alone
    assert (record.path, record.num_assistant_tokens, record.rounds) == ("transformers", 0, [])
    assert record.target_passes == record.new_tokens == len(record.tokens) > 0
