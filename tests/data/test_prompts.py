import copy
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.prompts import (
    chat_ids,
    free_prefix,
    read_dataset,
    template_ends,
    written_instruction,
)


def test_without_a_chat_template(tiny_tokenizer: Any) -> None:
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    assert chat_ids(plain, "the cat") == tuple(plain("the cat")["input_ids"])
    with pytest.raises(FastDraftError, match="magpie needs a chat template"):
        template_ends(plain)[0]


def test_free_text_starts_with_the_separator(target_tokenizer: Any, tiny_tokenizer: Any) -> None:
    assert free_prefix(target_tokenizer) == (0,)
    assert target_tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert free_prefix(tiny_tokenizer) == (0,)


def test_content_as_parts(tiny_tokenizer: Any) -> None:
    """Templates of vision models drop a string: they read a list of parts."""
    parts = copy.deepcopy(tiny_tokenizer)
    parts.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %}"
        "{{ p.text }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = parts.decode(chat_ids(parts, "the cat", "Be kind."))
    assert chat == "system:Be kind.user:the catassistant:"


def test_named_templates_without_a_default(tiny_tokenizer: Any) -> None:
    named = copy.deepcopy(tiny_tokenizer)
    named.chat_template = {"tool_use": tiny_tokenizer.chat_template, "rag": ""}
    with pytest.raises(FastDraftError, match=r"no default.*\['rag', 'tool_use'\].*save") as caught:
        chat_ids(named, "the cat")
    assert isinstance(caught.value.__cause__, ValueError)  # generate stops instead of counting


def test_an_empty_file_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(FastDraftError, match=r"cannot read .*empty\.jsonl \(it is empty\)"):
        list(read_dataset(str(tmp_path / "empty.jsonl"), None, "train", None, "dataset"))


# Chat templates as they are in use, written down here.
STYLES: dict[str, tuple[str, list[str]]] = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        [],
    ),
    "ChatML with a default system prompt": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        [],
    ),
    "Llama 3": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "Gemma": (
        "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    ),
    "Mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
    ),
    "Mistral, plain text": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{% endif %}{% endfor %}",
        [],
    ),
    "Phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    ),
    "Vicuna": (
        "A chat with an assistant. {% for m in messages %}{{ 'USER' if m.role == 'user' else "
        "'ASSISTANT' }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}ASSISTANT:"
        "{% endif %}",
        [],
    ),
}
INSTRUCTIONS = [
    "Write a poem about rain.",
    "What is 12 times 12?",
    "Ça va ?",
    "def f(x):\n    return x",
    "Name (at least) 3",
]


@pytest.fixture(scope="module", params=list(STYLES))
def styled(request: pytest.FixtureRequest, target_tokenizer: Any) -> Any:
    """The embedded target's tokenizer with another family's template and its special tokens."""
    template, special = STYLES[request.param]
    tokenizer = copy.deepcopy(target_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    tokenizer.style = request.param
    return tokenizer


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_magpie_works_for_any_template(styled: Any, instruction: str) -> None:
    first, last = template_ends(styled)
    chat = chat_ids(styled, instruction)
    assert chat[: len(first)] == first
    assert chat[len(chat) - len(last) :] == last
    # The words lie between, whole, and nothing of the template does.
    words = chat[len(first) : len(chat) - len(last)]
    assert styled.decode(words).strip() == instruction
    # So what a target writes as it learned to is put back as the chat it would have been.
    assert first + words + last == chat


def test_what_the_target_is_given_ends_before_the_users_first_token(styled: Any) -> None:
    text = styled.decode(template_ends(styled)[0])
    opening = {
        "Llama 3": "<|start_header_id|>user<|end_header_id|>\n\n",
        "Gemma": "<start_of_turn>user\n",
        "Mistral": "<s>[INST]",  # a space here would be one that the target has never seen
        "Mistral, plain text": "[INST]",
        "Phi 3": "<|user|>\n",
        "Vicuna": "USER:",
    }
    assert text.endswith(opening.get(styled.style, "<|im_start|>user\n"))
    assert ("Be kind." in text) == ("default" in styled.style)


def test_a_system_prompt_takes_the_place_of_the_templates_own(styled: Any) -> None:
    if styled.style == "Gemma":
        with pytest.raises(
            FastDraftError, match=r"refuses a conversation of system, user \(no sys"
        ):
            template_ends(styled, "Speak of birds.")
        return
    text = styled.decode(template_ends(styled, "Speak of birds.")[0])
    assert "Speak of birds." in text
    assert "Be kind." not in text
    own = [("system", "Speak of cats."), ("user", "Why?")]
    assert chat_ids(styled, own, "Speak of birds.") == chat_ids(styled, own)


def test_an_instruction_ends_where_the_target_or_the_template_says(styled: Any) -> None:
    _, suffix = template_ends(styled)
    special = set(styled.all_special_ids)
    words = tuple(styled("Name three birds.", add_special_tokens=False)["input_ids"])
    stop = styled.eos_token_id
    assert written_instruction((*words, stop), "stop", suffix, special) == words
    assert written_instruction(words, "length", suffix, special) is None
    # Mistral's user ends with no token that ends a text, and the target continues with an answer.
    on = (*words, *suffix, *words)
    assert written_instruction((*on, stop), "stop", suffix, special) == words
    assert written_instruction(on, "length", suffix, special) == words


def test_a_template_that_begins_with_the_user(tiny_tokenizer: Any) -> None:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}\n"
    with pytest.raises(FastDraftError, match="nothing before the user's message"):
        template_ends(bare)
