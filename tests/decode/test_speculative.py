"""Our loop against the target alone and against stock assisted generation, greedily."""

import gc
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_helpers import assert_equal_or_tied, padded, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import noisy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer
from zoo import noisy_draft, tiny

from fastdraft_hf import FastDraftError, assisted_decoding
from fastdraft_hf.data.prompts import chat_ids
from fastdraft_hf.decode.assisted import record_rounds
from fastdraft_hf.decode.cached import TorchModel
from fastdraft_hf.decode.loop import Loop
from fastdraft_hf.decode.patches import CACHE_NAME
from fastdraft_hf.decode.settings import set_draft_length
from fastdraft_hf.draft.build import initialize
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.draft.design import design_draft

TinyModel = Callable[..., LlamaForCausalLM]
PROMPTS = st.lists(st.integers(3, 287), min_size=1, max_size=12)
GAMMAS = st.integers(1, 8)
_is_plain = Loop._is_plain


def test_greedy_output_is_the_targets_over_many_prompts(
    target: LlamaForCausalLM, stranger: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    rng = random.Random(0)
    for number in range(208):
        prompt = [[rng.randrange(3, 288) for _ in range(rng.randrange(1, 13))]]
        draft = stranger if number % 4 == 0 else neighbour
        gamma, new = number % 8 + 1, number % 13 + 1
        alone = write(target, prompt, max_new_tokens=new)
        ours = write(target, prompt, draft, gamma, max_new_tokens=new)
        assert torch.equal(ours, alone), (prompt, gamma, new)


def test_three_hundred_calls_leave_nothing_behind(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        files = Path("/proc/self/fd")
        return len(gc.get_objects()), len(list(files.iterdir())) if files.exists() else 0

    def call() -> None:
        write(target, [[5, 6, 7]], neighbour, 3, max_new_tokens=6)

    for _ in range(20):
        call()
    objects, files = held()
    for _ in range(300):
        call()
    after, files_after = held()
    assert files_after == files
    assert after - objects < 300  # less than one object a call


@given(st.lists(PROMPTS, min_size=2, max_size=5), GAMMAS, st.integers(0, 2), st.booleans())
@settings(max_examples=30)
def test_a_batch_with_padding_on_the_left(
    target: LlamaForCausalLM,
    neighbour: LlamaForCausalLM,
    prompts: list[list[int]],
    gamma: int,
    copies: int,
    compacts: bool,
) -> None:
    """Rows roll back by different lengths; each must come out as if it were alone."""
    ids, mask = padded(prompts)
    alone = write(target, ids, attention_mask=mask, max_new_tokens=24)
    with pytest.MonkeyPatch.context() as patch:
        if compacts:
            patch.setattr(TorchModel, "waste_factor", 1.0)
            patch.setattr(TorchModel, "waste_slots", 0)
        given = {"attention_mask": mask, "max_new_tokens": 24}
        ours = write(target, ids, neighbour, gamma, copies, **given)
    assert torch.equal(ours, alone)


@given(
    PROMPTS,
    st.integers(0, 3),
    GAMMAS,
    st.integers(0, 2),
    st.booleans(),
    st.lists(st.integers(0, 287)),
)
@settings(max_examples=40)
def test_one_greedy_row_goes_the_short_way_as_the_general_one(
    target: LlamaForCausalLM,
    neighbour: LlamaForCausalLM,
    prompt: list[int],
    padding: int,
    gamma: int,
    copies: int,
    adapts: bool,
    ends: list[int],
) -> None:
    """Same text, same rounds, same γ at the end."""
    ids = torch.tensor([[0] * padding + prompt])
    mask = torch.tensor([[0] * padding + [1] * len(prompt)])
    schedule = "heuristic" if adapts else "constant"
    found = []
    for short in (True, False):
        taken = []

        def is_plain(loop: Loop, short: bool = short, taken: list[bool] = taken) -> bool:
            taken.append(_is_plain(loop))
            return short and taken[-1]

        with pytest.MonkeyPatch.context() as patch, record_rounds(target) as rounds:
            patch.setattr(Loop, "_is_plain", is_plain)
            set_draft_length(neighbour.generation_config, gamma, copies)
            neighbour.generation_config.num_assistant_tokens_schedule = schedule
            text = target.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=20,
                eos_token_id=ends or None,
                assistant_model=neighbour,
                custom_generate=assisted_decoding,
            )
        assert all(taken)
        config = neighbour.generation_config
        found.append((text.tolist(), list(rounds), config.num_assistant_tokens))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("number", "schedule", "threshold"),
    [(4, "heuristic", 0.0), (5, "constant", 0.4), (2, "heuristic_transient", 0.2)],
)
def test_the_drafts_own_settings_are_honoured(
    tiny_model: TinyModel,
    target: LlamaForCausalLM,
    number: int,
    schedule: str,
    threshold: float,
) -> None:
    found = {}
    for path in ("stock", "ours"):
        draft = noisy(tiny_model(seed=0))
        config = draft.generation_config
        config.num_assistant_tokens = number
        config.num_assistant_tokens_schedule = schedule
        config.assistant_confidence_threshold = threshold
        given = {"custom_generate": assisted_decoding} if path == "ours" else {}
        everything = []
        for first in range(30, 40):
            ids = torch.tensor([[first, 7]])
            with record_rounds(target) as rounds:
                target.generate(
                    ids, do_sample=False, max_new_tokens=24, assistant_model=draft, **given
                )
            everything.append(list(rounds))
        found[path] = everything, config.num_assistant_tokens
    assert found["ours"] == found["stock"]


def test_an_end_token_inside_a_drafted_block(tiny_model: TinyModel) -> None:
    target, draft = tiny_model(seed=0), tiny_model(seed=0)
    written = write(target, [[40, 41]])[0, 2:].tolist()
    for place in range(1, 7):
        ends = [written[place], 5]
        alone = write(target, [[40, 41]], eos_token_id=ends)
        for gamma in range(1, 9):
            assert torch.equal(write(target, [[40, 41]], draft, gamma, eos_token_id=ends), alone)
        both = torch.tensor([[40, 41], [99, 98]])
        assert torch.equal(
            write(target, both, draft, 4, eos_token_id=ends), write(target, both, eos_token_id=ends)
        )


def test_stop_strings(
    target: LlamaForCausalLM, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Stock may run past a stop string that ends inside a block; the target alone does not."""
    written = write(target, [[40, 41]])[0, 2:].tolist()
    for place in range(1, 6):
        stop = tiny_tokenizer.decode([written[place]])
        given = {"stop_strings": [stop], "tokenizer": tiny_tokenizer}
        alone = write(target, [[40, 41]], **given)
        for gamma in (2, 5):
            assert torch.equal(write(target, [[40, 41]], tiny_model(0), gamma, **given), alone)


def test_a_streamer_gets_every_token_once(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    streamer = Collect()
    output = write(target, [[40, 41]], neighbour, 3, streamer=streamer)
    assert streamer.got == output[0].tolist()
    assert streamer.ended == 1


def test_a_returned_cache_goes_on_with_the_text(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    """The second turn of a talk: the cache of the first is handed in again."""
    first = write(target, [[40, 41]], neighbour, 3, return_dict_in_generate=True, eos_token_id=None)
    cache = getattr(first, CACHE_NAME)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, torch.tensor([[60, 61, 62]])], 1)
    alone = write(target, longer, eos_token_id=None)
    ours = write(target, longer, neighbour, 3, eos_token_id=None, **{CACHE_NAME: cache})
    assert torch.equal(ours, alone)


def test_an_empty_batch_comes_back_empty(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    empty = torch.zeros(0, 4, dtype=torch.long)
    output = write(target, empty, neighbour)
    assert output.shape[0] == 0


def test_mismatched_vocabularies_are_refused_before_any_work(
    target: LlamaForCausalLM, tiny_model: TinyModel
) -> None:
    other = tiny_model(seed=1, vocab_size=300)
    with pytest.raises(ValueError, match="different tokenizers"):
        write(target, [[40, 41]], other)
    processors, criteria = [], []
    with pytest.raises(FastDraftError, match="has 300 tokens and the target's 288"):
        assisted_decoding(
            target,
            torch.tensor([[40]]),
            processors,
            criteria,
            target.generation_config,
            assistant_model=other,
        )


def test_a_draft_of_another_type_and_device(
    target: LlamaForCausalLM, tiny_model: TinyModel
) -> None:
    draft = tiny_model(seed=0).bfloat16().to("cuda" if torch.cuda.is_available() else "cpu")
    for prompt in ([[40, 41]], [[5, 6], [7, 8]]):
        assert torch.equal(write(target, prompt, draft), write(target, prompt))


@pytest.mark.parametrize("ids", ["first", "chosen"])
def test_a_draft_with_a_reduced_vocabulary(
    target: LlamaForCausalLM, tiny_model: TinyModel, ids: str
) -> None:
    """A head that scores half of the tokens drafts those, whatever columns it has them in."""
    draft = tiny_model(seed=0, tie_word_embeddings=False)
    rows = torch.arange(144) if ids == "first" else torch.arange(3, 288, 2)
    head = torch.nn.Linear(32, len(rows), bias=False)
    with torch.no_grad():
        head.weight.copy_(target.get_output_embeddings().weight[rows])
        draft.model.load_state_dict(target.model.state_dict())
    draft.lm_head = head
    if ids == "chosen":
        draft.config.head_token_ids = rows.tolist()
    accepted = 0
    for first in range(40, 60):
        alone = write(target, [[first, 41]])
        with record_rounds(target) as rounds:
            assert torch.equal(write(target, [[first, 41]], draft, 3), alone)
            sampled = write(target, [[first, 41]], draft, 3, do_sample=True, top_k=20)
        assert sampled.shape[1] > 2
        only = {"prefix_allowed_tokens_fn": lambda batch, ids: [200, 202], "do_sample": True}
        assert set(write(target, [[first, 41]], draft, 3, **only)[0, 2:].tolist()) <= {200, 202}
        accepted += sum(a for _, a in rounds)
    assert accepted > 20


def test_what_it_cannot_do_the_target_does_alone_with_one_warning(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    def check(words: str, prompt: Any = ((40, 41),), **given: Any) -> None:
        alone = write(target, prompt, **given)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = write(target, prompt, neighbour, 3, **given)
        told = [str(w.message) for w in caught if "assisted_decoding" in str(w.message)]
        assert len(told) == 1, told
        assert words in told[0]
        same = getattr(ours, "sequences", ours), getattr(alone, "sequences", alone)
        assert torch.equal(*same)

    check("beam search takes no draft", num_beams=3)
    check("a dynamic cache", use_cache=False, **{CACHE_NAME: None})
    check("hidden states", return_dict_in_generate=True, output_hidden_states=True)
    allowed = {"prefix_allowed_tokens_fn": lambda batch, ids: [50, 60, 70 + batch]}
    check("needs whole batches", ((40, 41), (5, 6)), **allowed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {"do_sample": False, "max_new_tokens": 4, "custom_generate": assisted_decoding}
        output = target.generate(torch.tensor([[40, 41]]), **given)
    assert "no assistant_model" in str([w.message for w in caught])
    assert torch.equal(output, write(target, [[40, 41]], max_new_tokens=4))
    with pytest.raises(FastDraftError, match="repository on the Hub"):
        write(target, [[40, 41]], neighbour, penalty_alpha=0.6, top_k=4)


def test_phi3_goes_through_the_loop_until_its_rotary_factors_switch() -> None:
    """The paper's own target; it prepares inputs of its own for that one switch."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = Phi3Config(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16,
        },
    )
    torch.manual_seed(0)
    target, draft = Phi3ForCausalLM(config).eval(), noisy(Phi3ForCausalLM(config).eval())
    ids = torch.randint(2, 64, (1, 4))
    assert torch.equal(
        write(target, ids, draft, 3, max_new_tokens=12), write(target, ids, max_new_tokens=12)
    )
    with pytest.warns(UserWarning, match="prepares inputs of its own"):
        write(target, ids, draft, 3, max_new_tokens=13)


def test_windows_and_batches() -> None:
    """A window counts slots of the cache, so hidden ones would shift it; a single row has none."""
    target, draft = tiny("mistral"), noisy_draft("mistral")
    one, both = (torch.randint(4, 64, (rows, 4)) for rows in (1, 2))
    for gamma in (1, 3, 5):
        alone = write(target, one, max_new_tokens=20, eos_token_id=None)
        ours = write(target, one, draft, gamma, max_new_tokens=20, eos_token_id=None)
        assert torch.equal(ours, alone)
    with pytest.warns(UserWarning, match="slots of the cache|a dynamic cache"):
        ours = write(target, both, draft, 3, max_new_tokens=20)
    assert torch.equal(ours, write(target, both, max_new_tokens=20))


def test_other_callables_are_left_as_they_were(target: LlamaForCausalLM) -> None:
    """`patches` changes what `generate` passes to our callable only."""
    seen: dict[str, Any] = {}

    def other(model: Any, input_ids: torch.Tensor, draft: Any = None, **given: Any) -> torch.Tensor:
        seen.update(given, draft=draft)
        return input_ids

    target.generate(torch.tensor([[40]]), custom_generate=other, draft="mine", max_new_tokens=2)
    assert seen["draft"] == "mine"
    assert "assistant_model" not in seen


def test_a_cache_of_a_prompt_with_padding(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    ids = torch.tensor([[0, 0, 40, 41, 42]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    alone = write(target, ids, attention_mask=mask)
    cache = DynamicCache()
    with torch.no_grad():
        target(
            ids[:, :4],
            attention_mask=mask[:, :4],
            position_ids=torch.tensor([[0, 0, 0, 1]]),
            **{CACHE_NAME: cache},
        )
    ours = write(target, ids, neighbour, 3, attention_mask=mask, **{CACHE_NAME: cache})
    assert torch.equal(ours, alone)


def test_the_real_target(target_folder: Path, target_tokenizer: Any) -> None:
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    design = DesignConfig(hidden_size=192, num_hidden_layers=2)
    config = design_draft(AutoConfig.from_pretrained(target_folder), design)
    draft = initialize(target_folder, config, design, seed=0)[0].eval()
    texts = ("Name three colours.", "def add(a, b):")
    prompts = [list(chat_ids(target_tokenizer, text)) for text in texts]
    ids, mask = padded(prompts)
    batch = write(target, ids, draft, 3, attention_mask=mask, max_new_tokens=10)
    for row, prompt in enumerate(prompts):
        alone = write(target, [prompt], max_new_tokens=10)
        assert_equal_or_tied(target, alone, write(target, [prompt], draft, 2, max_new_tokens=10))
        assert_equal_or_tied(target, alone, batch[row : row + 1, ids.shape[1] - len(prompt) :])
