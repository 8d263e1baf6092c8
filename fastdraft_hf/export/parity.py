"""Whether an exported model says what PyTorch says: logits, greedy text, and the tokenizer's ids.

Exports are asked in float32 (`EXACT`): on a CPU with bfloat16 OpenVINO rounds by default, and its
KV cache is 8 bits wide, which says nothing about what was written to the disk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._sequences import first_difference
from fastdraft_hf._ties import LOGIT_TOLERANCE, Margin
from fastdraft_hf.draft.reduced_vocabulary import read_reduced_vocabulary
from fastdraft_hf.export.reduced_vocabulary import LOWEST

if TYPE_CHECKING:
    import torch

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}

# What is read and continued. No evaluation prompt is among them.
PROMPTS = (
    "The harbour was quiet that morning, and",
    "def running_mean(values, width):\n    ",
    "To make a simple vegetable soup, first",
    "Der Zug nach Norden fährt um 12:45 Uhr und",
)


@dataclass(frozen=True)
class Parting:
    """Where a greedy text leaves PyTorch's: the prompt, the place, and the margin there.

    Attributes:
        margin: PyTorch's logit of its own token minus that of the other one.
        tie: the margin is within what two kernels differ by.
    """

    prompt: int
    place: int
    margin: float
    tie: bool


@dataclass(frozen=True)
class Parity:
    """What was compared and how far apart it is.

    Attributes:
        positions: token positions whose logits were compared.
        max_logit_difference: the largest of all.
        logit_size: largest absolute logit of PyTorch's, for scale.
        same_best: share of positions with the same most probable token.
        texts: greedy texts that were written.
        partings: those that differ.
    """

    positions: int
    max_logit_difference: float
    logit_size: float
    same_best: float
    texts: int
    partings: tuple[Parting, ...]

    @property
    def exact(self) -> bool:
        """Whether the differences are those of two kernels of one precision."""
        close = self.max_logit_difference <= LOGIT_TOLERANCE * max(self.logit_size, 1.0)
        return close and all(parting.tie for parting in self.partings)

    def lines(self) -> list[str]:
        """Return the findings for a terminal."""
        same = self.texts - len(self.partings)
        found = [
            f"logits: largest difference {self.max_logit_difference:.2g} at logits up to "
            f"{self.logit_size:.3g}, same best token at {self.same_best:.1%} of {self.positions} "
            "positions",
            f"greedy text: {same} of {self.texts} the same",
        ]
        for parting in self.partings:
            found.append(
                f"  text {parting.prompt} parts at token {parting.place}, PyTorch's margin there "
                f"{parting.margin:.2g}{' (a tie)' if parting.tie else ''}"
            )
        return found

    def facts(self) -> dict[str, Any]:
        """Return the findings for a record."""
        return dataclasses.asdict(self)


# Token ids [1, T] -> logits [1, T, V].
Logits = Callable[["torch.Tensor"], "torch.Tensor"]


def prompt_ids(tokenizer: Any) -> list[list[int]]:
    """Return `PROMPTS` as token ids; a token the tokenizer does not know is left out."""
    found = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return [ids for ids in found if ids]


def compare(
    model: Any,
    logits: Logits,
    write: Callable[[list[int], int], list[int]],
    prompts: Sequence[list[int]],
    new_tokens: int = 24,
) -> Parity:
    """Compare a PyTorch model with another form of it.

    Args:
        model: the PyTorch model.
        logits: the other's logits of a text.
        write: the other's greedy continuation of a prompt, given a number of tokens.
        prompts: token ids to continue; every text is read as PyTorch continued it.
        new_tokens: length of a continuation.
    """
    import torch

    difference = size = 0.0
    positions = same = 0
    partings = []
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            own = _greedy(model, prompt, new_tokens)
            text = torch.tensor([[*prompt, *own]])
            ours, theirs = model(input_ids=text).logits[0].float(), logits(text)[0].float()
            difference = max(difference, float((ours - theirs).abs().max()))
            # What a reduced vocabulary does not score is no logit.
            largest = float(ours[ours > LOWEST].abs().max())
            size = max(size, largest)
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            positions += len(ours)
            other = write(prompt, new_tokens)
            place = first_difference(own, other)
            if place is None:
                continue
            margin = math.inf  # one of the texts ended early: nothing to compare
            if place < min(len(own), len(other)):
                at = ours[len(prompt) + place - 1]
                margin = float(at[own[place]] - at[other[place]])
            partings.append(Parting(number, place, margin, Margin(margin, largest).tie))
    return Parity(positions, difference, size, same / positions, len(prompts), tuple(partings))


def compare_openvino(model: Path, exported: Path) -> Parity:
    """Compare a Hugging Face folder with its OpenVINO folder, both in float32."""
    import torch
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = _load(AutoModelForCausalLM, model)
    head = read_reduced_vocabulary(model)
    if head is not None:
        _score_only(ours, head.token_ids)
    theirs = OVModelForCausalLM.from_pretrained(exported, ov_config=EXACT)

    def logits(text: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(theirs(input_ids=text, attention_mask=torch.ones_like(text)).logits)

    def write(prompt: list[int], count: int) -> list[int]:
        return _greedy(theirs, prompt, count)

    return compare(ours, logits, write, prompt_ids(tokenizer))


def compare_gguf(model: Path, file: Path) -> Parity:
    """Compare a Hugging Face folder with its GGUF file, read back by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = _load(AutoModelForCausalLM, model)
    theirs = read_gguf(model, file)

    def write(prompt: list[int], count: int) -> list[int]:
        return _greedy(theirs, prompt, count)

    return compare(ours, lambda text: theirs(input_ids=text).logits, write, prompt_ids(tokenizer))


def read_gguf(model: Path, file: Path) -> Any:
    """Return the model of a GGUF file, its weights dequantised to float32.

    transformers reads weights and names; the config is that of the folder it was made from, because
    the reader leaves some of it out (head size, rope scaling). In GGUF a Mistral is a Llama.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if config.model_type == "mistral":
        shared = {**config.to_dict()}
        for name in ("model_type", "architectures", "sliding_window"):
            shared.pop(name, None)
        config = LlamaConfig(**shared)
    return _load(AutoModelForCausalLM, file.parent, gguf_file=file.name, config=config)


def _load(auto: Any, folder: Path, **options: Any) -> Any:
    import torch

    model = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **options)
    return model.eval()


def _score_only(model: Any, token_ids: Sequence[int]) -> None:
    """Give every other logit the value that an exported reduced vocabulary has there, in place."""
    import torch

    index = torch.tensor(list(token_ids))

    def scatter(module: Any, inputs: Any, output: Any) -> Any:
        whole = output.logits
        output.logits = torch.full_like(whole, LOWEST).index_copy_(
            -1, index, whole.index_select(-1, index)
        )
        return output

    model.register_forward_hook(scatter)


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found
