"""Every private hook of transformers that decoding relies on.

`tests/decode/test_corners.py` fails when one of them moves.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.utils import GENERATION_MODES_MAPPING

from fastdraft_hf._errors import FastDraftError

# The cache's name in models, `generate` and their outputs. transformers 5.24 renamed it; what users
# pass to `generate` keeps the old name.
CACHE_NAME = (
    "cache"
    if "cache" in {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
    else "past_key_values"
)


def is_stateful(model: PreTrainedModel) -> bool:
    """Return whether transformers marks a model's state as one that cannot be rolled back."""
    return bool(getattr(model, "_is_stateful", False))


def deliver_arguments(decoding: Callable[..., Any]) -> None:
    """Make ``generate`` pass the draft, the streamer and the tokenizers on to ``decoding``.

    transformers (5.5 to 5.24) drops ``assistant_model``, ``streamer``, ``tokenizer`` and
    ``assistant_tokenizer`` on the way to a ``custom_generate`` callable: it collects only arguments
    that ``generate`` does not name itself. For this callable alone they are collected as for stock
    assisted generation, which also checks the vocabularies before any work.
    """
    collect = GenerationMixin._extract_generation_mode_kwargs

    @functools.wraps(collect)
    def collect_all(self: Any, custom_generate: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        ours = custom_generate is decoding
        found: dict[str, Any] = collect(self, None if ours else custom_generate, *args, **kwargs)
        return found

    GenerationMixin._extract_generation_mode_kwargs = collect_all


def decode_alone(model: PreTrainedModel, input_ids: torch.Tensor, prepared: dict[str, Any]) -> Any:
    """Decode with the target alone, in the mode that the generation config asks for.

    ``prepared`` is what ``generate`` prepared for a decoding method.

    Raises:
        FastDraftError: the mode's code lies in a repository on the Hub.
    """
    mode = prepared["generation_config"].get_generation_mode(None)
    method = GENERATION_MODES_MAPPING[mode]
    if "/" in method:
        raise FastDraftError(
            f"{mode.replace('_', ' ')} lies in a repository on the Hub: call generate with "
            f"custom_generate='{method}' and without a draft"
        )
    cache: Any = prepared.get(CACHE_NAME)
    if isinstance(cache, DynamicCache) and not cache.layers:
        # For a draft, `generate` prepares layers of full attention, whatever the model has.
        prepared = {**prepared, CACHE_NAME: DynamicCache(config=model.config.get_text_config())}
    return getattr(model, method)(input_ids, **prepared)


@contextlib.contextmanager
def watch_stock_rounds(
    target: PreTrainedModel, report: Callable[[int, int], None]
) -> Iterator[None]:
    """Call ``report(drafted, accepted)`` after every round of stock assisted generation.

    transformers does not expose acceptance. ``update_candidate_strategy`` of the candidate
    generator is called once per round with the scores of all drafted positions plus one.
    """
    make = target._get_candidate_generator

    def recording(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        update = generator.update_candidate_strategy

        def update_and_report(input_ids: Any, scores: Any, num_matches: Any) -> Any:
            report(int(scores.shape[1]) - 1, int(num_matches))
            return update(input_ids, scores, num_matches)

        generator.update_candidate_strategy = update_and_report
        return generator

    with patch.object(target, "_get_candidate_generator", recording):
        yield
