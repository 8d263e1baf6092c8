import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.cli.main import main
from fastdraft_hf.draft.vocabulary import (
    Vocabulary,
    check_vocabulary,
    compare_vocabularies,
    match_tokens,
    token_bytes,
)


def saved_with_swapped_tokens(tokenizer: Any, folder: Path, first: str, second: str) -> Any:
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(data), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]) -> Save:
    """Save a tiny draft with a tokenizer; keyword arguments change its config."""

    def make(tokenizer: PreTrainedTokenizerFast, **config: Any) -> Path:
        tiny_model(num_hidden_layers=1, **config).save_pretrained(tmp_path / "d")
        tokenizer.save_pretrained(tmp_path / "d")
        return tmp_path / "d"

    return make


@pytest.mark.parametrize("donor", [False, True])
def test_two_tokens_swapped(
    tiny_target_folder: Path, tiny_tokenizer: Any, tmp_path: Path, donor: bool
) -> None:
    # Same tokens, same length: only the maps differ. No resizing helps.
    saved_with_swapped_tokens(tiny_tokenizer, tmp_path, "a", "b")
    ids = tiny_tokenizer.get_vocab()
    first = min(ids["a"], ids["b"])
    message = rf"^k: .*: its vocabulary is not the target's: 2 ids mean .* \({first}: 'a' and 'b'"
    for resize in (False, True):
        with pytest.raises(FastDraftError, match=message) as raised:
            check_vocabulary(tiny_target_folder, tmp_path, "k", donor=donor, resize=resize)
        assert ("transplant" in str(raised.value)) is donor


def test_one_token_more(save: Save, tiny_target_folder: Path, tiny_tokenizer: Any) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<extra>"])
    draft = save(other)
    message = r"one id only .* has \(288 '<extra>'\).*design.resize"
    with pytest.raises(FastDraftError, match=message):
        check_vocabulary(tiny_target_folder, draft)
    with pytest.raises(FastDraftError, match=r"one id only the target has .*; the 288 shared"):
        check_vocabulary(Vocabulary.of_folder(draft, "the target"), tiny_target_folder)
    with pytest.raises(FastDraftError, match=r"^design\.donor: .*so set design\.resize$"):
        check_vocabulary(tiny_target_folder, draft, "design.donor", donor=True)
    assert check_vocabulary(tiny_target_folder, draft, resize=True).verdict == "extended"


def test_another_eos_is_refused_and_other_roles_are_warned_of(
    save: Save, tiny_target_folder: Path, tiny_tokenizer: Any, caplog: Any
) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|endoftext|>"
    draft = save(other)
    message = r"its EOS token is <\|endoftext\|>, the target's <\|im_end\|>; copy"
    with pytest.raises(FastDraftError, match=message):
        check_vocabulary(tiny_target_folder, draft)
    # It gets the target's tokenizer, and with it the target's EOS token.
    check_vocabulary(tiny_target_folder, draft, donor=True)
    assert caplog.messages == []
    check_vocabulary(tiny_target_folder, draft, "design.draft", resize=True)
    assert "design.draft: " in caplog.messages[0]
    caplog.clear()
    other.eos_token, other.pad_token = "<|im_end|>", "<|im_end|>"
    check_vocabulary(tiny_target_folder, save(other))
    (message,) = caplog.messages
    assert message.endswith("differs from the target: pad: '<|endoftext|>' and '<|im_end|>'")


def vocabulary(tokens: dict[int, str], rows: int | None = None, end: int = 1) -> Vocabulary:
    ids = {token: index for index, token in tokens.items()}
    return Vocabulary("x", ids, {"eos": tokens.get(end)}, rows)


tokens_strategy = st.dictionaries(
    st.integers(0, 30), st.text("abc", min_size=1, max_size=3), min_size=1
).filter(lambda tokens: len(set(tokens.values())) == len(tokens))


@given(tokens_strategy, tokens_strategy)
def test_reports_count_every_id_once(ours: dict[int, str], theirs: dict[int, str]) -> None:
    report = compare_vocabularies(vocabulary(ours), vocabulary(theirs))
    shared = ours.keys() & theirs.keys()
    assert report.agreeing + report.differing == len(shared)
    assert report.agreeing == sum(ours[i] == theirs[i] for i in shared)
    same = ours == theirs
    assert (report.verdict == "identical") is same
    if report.verdict in ("padded", "extended"):
        assert all(ours[i] == theirs[i] for i in shared)


def test_rows_are_compared_where_they_are_known() -> None:
    tokens = {0: "a", 1: "<end>", 2: "<eot>"}
    report = compare_vocabularies(vocabulary(tokens, 151_936), vocabulary(tokens, 152_064))
    assert report.verdict == "padded"
    assert report.problems == [
        "the heads score 151,936 and 152,064 ids: padding, which can be resized"
    ]
    assert compare_vocabularies(vocabulary(tokens), vocabulary(tokens, 4)).verdict == "identical"
    report = compare_vocabularies(vocabulary(tokens), vocabulary(tokens, end=2))
    assert report.verdict == "identical"
    assert report.problems == ["eos: '<end>' and '<eot>'"]


def test_a_folder_that_cannot_be_read(tiny_target_folder: Path, tmp_path: Path) -> None:
    found = Vocabulary.of_folder(tiny_target_folder)
    with pytest.raises(FastDraftError, match=r"^draft: no tokenizer can be read"):
        check_vocabulary(found, tmp_path, "draft")
    shutil.copytree(tiny_target_folder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(FastDraftError, match="no config can be read in"):
        Vocabulary.of_folder(tmp_path / "copy")


def test_bytes_of_every_spelling(tiny_tokenizer: Any, other_tokenizer: Any) -> None:
    byte_level, pieces = token_bytes(tiny_tokenizer), token_bytes(other_tokenizer)
    ours, theirs = tiny_tokenizer.get_vocab(), other_tokenizer.get_vocab()
    assert byte_level[ours["Ġthe"]] == b" the"
    assert byte_level[ours["Ċ"]] == b"\n"
    assert pieces[theirs["▁t"]] == b" t"
    assert pieces[theirs["<0x0A>"]] == b"\n"
    assert not {ours["<|im_end|>"]} & byte_level.keys()
    assert not {theirs["</s>"], theirs["<s>"]} & pieces.keys()
    # Every byte has a token of its own in both.
    assert {bytes([b]) for b in range(256)} <= set(byte_level.values())
    assert {bytes([b]) for b in range(256)} <= set(pieces.values())


@given(st.text(min_size=1, max_size=12))
def test_matched_pieces_spell_the_token(
    tiny_tokenizer: Any, other_tokenizer: Any, text: str
) -> None:
    for one, other in itertools.permutations((tiny_tokenizer, other_tokenizer)):
        target = copy.deepcopy(one)
        target.add_tokens([text])
        ours, theirs = token_bytes(target), token_bytes(other)
        matches, counts = match_tokens(target, other)
        for index, pieces in matches.items():
            if index in ours:
                assert b"".join(theirs[p] for p in pieces) == ours[index]
        assert counts["none"] == 0


def test_special_tokens_go_by_role(tiny_tokenizer: Any, other_tokenizer: Any) -> None:
    # <|im_start|> is bos and the mark of a turn; <|endoftext|> pads and stands for the unknown.
    roles = {"<|im_end|>": "</s>", "<|im_start|>": "<s>", "<|endoftext|>": "<unk>"}
    pieces, _ = match_tokens(tiny_tokenizer, other_tokenizer)
    ids, others = tiny_tokenizer.get_vocab(), other_tokenizer.get_vocab()
    for token, other in roles.items():
        assert pieces[ids[token]] == [others[other]]


def test_the_command(
    tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"  # no weights are needed
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_target_folder, other, ignore=ignore)
    assert main(["vocabulary", str(tiny_target_folder), str(other)]) == 0
    assert "can draft for the other as it is" in capsys.readouterr().out
    saved_with_swapped_tokens(AutoTokenizer.from_pretrained(other), other, "a", "b")
    assert main(["vocabulary", str(tiny_target_folder), str(other)]) == 1
    assert "2 ids mean different tokens" in capsys.readouterr().out
    assert main(["vocabulary", str(tiny_target_folder), str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
