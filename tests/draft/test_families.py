"""Every family, through everything that is asked of a draft."""

import copy

import pytest
import torch
from draft_targets import INSTALLED, LATENT, VOCABULARY, randomised, tiny_target
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decode.obstacles import cannot_roll_back
from fastdraft_hf.decode.speculative import assisted_decoding
from fastdraft_hf.draft.build import initialize
from fastdraft_hf.draft.config import DesignConfig, Initialization
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.draft.families import FAMILIES, count_parameters

IDS = torch.tensor([[5, 17, 40, 8, 77, 3]])


@pytest.mark.parametrize("family", INSTALLED)
@settings(max_examples=2, phases=[Phase.generate])
@given(
    kind=st.sampled_from(["scratch", "project", "prune"]),
    heads=st.sampled_from([(8, 8), (8, 4), (8, 2), (4, 4), (4, 1)]),
    tied=st.booleans(),
    layers=st.integers(1, 3),
    budget=st.integers(10_000, 90_000),
    seed=st.integers(0, 9),
)
def test_every_family_gives_a_draft_that_works(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    kind: Initialization,
    heads: tuple[int, int],
    tied: bool,
    layers: int,
    budget: int,
    seed: int,
) -> None:
    relative = FAMILIES[family].dense
    if relative and kind == "prune":
        kind = "project"
    fields = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    if family in LATENT:
        fields["num_key_value_heads"] = heads[0]
    target_config = tiny_target(family, tie_word_embeddings=tied, **fields)
    before = copy.deepcopy(target_config.to_dict())
    wanted = DesignConfig(params=budget, num_hidden_layers=layers, init=kind)
    try:
        config = design_draft(target_config, wanted)
    except FastDraftError as error:
        few_widths = not FAMILIES[family].own_head_size and "among its heads" in str(error)
        assert few_widths or "cannot hold a vocabulary" in str(error)  # noqa: PT017
        return
    finally:
        assert target_config.to_dict() == before
    assert config.model_type == (relative or family)
    assert (config.num_hidden_layers, config.vocab_size) == (layers, VOCABULARY)
    assert config.tie_word_embeddings is tied
    assert config.hidden_size <= 64
    size = count_parameters(config)
    assert size <= 1.02 * budget
    target = randomised(target_config, seed=2)
    folder = tmp_path_factory.mktemp("target")
    target.save_pretrained(folder)
    draft, facts = initialize(folder, config, wanted, seed)
    assert draft.num_parameters() == size
    assert facts["init"] == kind

    saved = tmp_path_factory.mktemp("draft")
    draft.save_pretrained(saved)
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    draft.eval()
    with torch.no_grad():
        logits = draft(IDS).logits
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(loaded(IDS).logits, logits)

    loaded.generation_config.num_assistant_tokens = 3
    greedy = {"max_new_tokens": 6, "do_sample": False}
    alone = target.generate(IDS, **greedy).tolist()
    ours = {"assistant_model": loaded, "custom_generate": assisted_decoding}
    if target._is_stateful:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            target.generate(IDS, **ours, **greedy)
    elif cannot_roll_back(target_config):
        with pytest.warns(UserWarning, match="state that cannot be taken back"):
            assert target.generate(IDS, **ours, **greedy).tolist() == alone
    else:
        assert target.generate(IDS, assistant_model=loaded, **greedy).tolist() == alone
        assert target.generate(IDS, **ours, **greedy).tolist() == alone
