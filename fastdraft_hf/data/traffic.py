"""Logged requests and answers of the target: text to align a draft on, and prompts to measure it.

A log is JSON Lines (or a JSON array, also compressed) in the form of OpenAI's API, a request and
its response in one object. Where they stand in it differs between gateways, so several forms are
read:

    {"request": {"messages": [...], "tools": [...]}, "response": {"choices": [...]}}
    {"request": {"body": {...}}, "response": {"body": {...}}}
    {"messages": [..., {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "response": {"choices": [{"text": "..."}]}}

A response may be a list of streamed chunks, or their text (``data: {...}`` lines).

Conversations are told apart by the user's first message. One in ten, by its digest, is held out:
training never reads it, and tasks of kind traffic read nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError, holds_secret
from fastdraft_hf.data.engines import Completion, Request, completed
from fastdraft_hf.data.sources import json_rows, matching_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 10  # one conversation in so many
# By the ids of a prompt: the ids of its answer, and whether the target ended it.
Answers = dict[tuple[int, ...], tuple[tuple[int, ...], bool]]


@dataclass(frozen=True)
class Exchange:
    """A request and the target's answer.

    Attributes:
        messages: the chat so far; the text, of a request without chat.
        answer: the assistant's message, or text.
        ended: whether the target ended it, not a length limit.
        model: the name that answered, as it is logged.
        tools: that the request offered.
    """

    messages: list[dict[str, Any]] | str
    answer: dict[str, Any] | str
    ended: bool = True
    model: str = ""
    tools: list[Any] | None = None

    @property
    def first(self) -> str:
        """The first message of the user, or the text."""
        if isinstance(self.messages, str):
            return self.messages
        return next(str(one["content"]) for one in self.messages if one["role"] == "user")

    @functools.cached_property
    def text(self) -> str:
        """Everything that was written, for searches."""
        return json.dumps([self.messages, self.answer], ensure_ascii=False)

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.first.encode(errors="replace")).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT == 0

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of the prompt, and those of the answer with what the template ends it by.

        Raises:
            FastDraftError: the template refuses the chat, or writes its turns otherwise when an
                answer follows.
        """
        if isinstance(self.messages, str):
            end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            answer = tokenizer(str(self.answer), add_special_tokens=False)["input_ids"]
            return tuple(tokenizer(self.messages)["input_ids"]), (*answer, *end)
        given: dict[str, Any] = {"tools": self.tools, "tokenize": False}
        try:
            prompt = tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, **given
            )
            whole = tokenizer.apply_chat_template([*self.messages, self.answer], **given)
        except Exception as error:  # a template is a program
            raise FastDraftError(f"the chat template refuses it ({error})") from error
        if not str(whole).startswith(str(prompt)):
            raise FastDraftError("the chat template writes another text before an answer")
        parts = (str(prompt), str(whole)[len(str(prompt)) :])
        first, second = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        return tuple(first), tuple(second)


def read_traffic(
    dataset: str,
    held_out: bool,
    counts: Counter[str],
    *,
    model: str | None = None,
    drop_patterns: Sequence[str] = (),
) -> Iterator[Exchange]:
    """Yield the exchanges of log files that are held out, or those that are not.

    Args:
        dataset: a file, a folder or a glob.
        held_out: which.
        counts: gets the reasons why others are left out: ``no chat``, ``no answer``,
            ``another model``, ``secret`` (what looks like a credential), ``pattern``.
        model: the name that must have answered.
        drop_patterns: regular expressions; an exchange that contains one is left out.

    Raises:
        FastDraftError: no file, a file is not JSON, or several models answered and none is named.
    """
    files = matching_files(dataset)
    if not files:
        raise FastDraftError(f"dataset: no file matches '{dataset}'")
    patterns = [re.compile(pattern) for pattern in drop_patterns]
    named: str | None = model
    for file in files:
        for row in json_rows(file):
            found = exchange(row)
            if isinstance(found, str):
                counts[found] += 1
                continue
            if model is None and found.model:
                if named is not None and named != found.model:
                    raise FastDraftError(
                        f"model: {dataset} has answers of {named} and of {found.model}; name the "
                        "one that is the target"
                    )
                named = found.model
            if found.held_out != held_out:
                continue
            if model is not None and found.model != model:
                counts["another model"] += 1
            elif holds_secret(found.text):
                counts["secret"] += 1
            elif any(pattern.search(found.text) for pattern in patterns):
                counts["pattern"] += 1
            else:
                yield found


def exchange(row: Any) -> Exchange | str:
    """Return the request and the answer of a logged row, or the reason why it has none."""
    if not isinstance(row, dict):
        return "no chat"
    request, response = _inner(row.get("request", row)), row.get("response", row)
    if not isinstance(request, dict):
        return "no chat"
    chat, text = request.get("messages"), request.get("prompt")
    answered = _answer(response)
    if isinstance(chat, list):
        messages = [_message(one) for one in chat]
        last = messages[-1] if messages else None
        if answered is None and last is not None and last["role"] == "assistant":
            answered = last, True, str(request.get("model") or "")
            del messages[-1]
        if answered is None or not isinstance(answered[0], dict):
            return "no answer"
        whole = [one for one in messages if one is not None]
        if len(whole) < len(messages) or all(one["role"] != "user" for one in whole):
            return "no chat"
        tools = request.get("tools") or None
        return Exchange(whole, *answered, tools=tools if isinstance(tools, list) else None)
    if not isinstance(text, str):
        return "no chat"
    if answered is None or not isinstance(answered[0], str):
        return "no answer"
    return Exchange(text, *answered)


def _inner(value: Any) -> Any:
    """Return a request or a response without the HTTP around it, read if it is JSON as text."""
    value = value["body"] if isinstance(value, dict) and "body" in value else value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _answer(response: Any) -> tuple[dict[str, Any] | str, bool, str] | None:
    """Return the first choice of a response, whether it ended, and the model's name."""
    found = _inner(response)
    if isinstance(found, str):
        lines = (line[5:].strip() for line in found.splitlines() if line.startswith("data:"))
        try:
            found = [json.loads(line) for line in lines if line != "[DONE]"]
        except (ValueError, RecursionError):
            return None
    chunks = found if isinstance(found, list) else [found]
    whole: dict[str, Any] = {}
    reason, model = None, ""
    for chunk in chunks:
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            return None
        model = str(chunk.get("model") or model)
        for choice in chunk["choices"]:
            if not isinstance(choice, dict) or choice.get("index", 0) != 0:
                continue
            reason = choice.get("finish_reason") or reason
            part = choice.get("message", choice.get("delta"))
            whole = _merged(whole, {"text": choice.get("text")} if part is None else part)
            if not isinstance(whole, dict):
                return None
    if isinstance(whole.get("text"), str) and whole["text"]:
        return whole["text"], reason != "length", model
    message = _message({"role": "assistant", **whole})
    if message is None or reason == "content_filter" or not _says(message):
        return None
    return message, reason != "length", model


_REASONING = "reasoning_content"
_GROWING = ("content", "text", "arguments", _REASONING)
_KEPT = ("role", "content", "tool_calls", "tool_call_id", "name", _REASONING)


def _merged(old: Any, new: Any, key: str = "") -> Any:
    """Return what a chunk adds to what came before: texts grow, and calls of tools by number."""
    if key == "tool_calls" and isinstance(new, list):
        calls = [call for call in new if isinstance(call, dict)]
        new = {str(call.get("index", place)): call for place, call in enumerate(calls)}
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {name: _merged(old.get(name), one, name) for name, one in new.items()}
    if isinstance(old, str) and isinstance(new, str) and key in _GROWING:
        return old + new
    return old if new is None else new


def _message(value: Any) -> dict[str, Any] | None:
    """Return what a template reads of a message, its text as one string; ``None`` for images."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return None
    kept = {key: value[key] for key in _KEPT if value.get(key) is not None}
    content = kept.setdefault("content", "")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or "text" not in part for part in content):
            return None
        kept["content"] = "".join(str(part["text"]) for part in content)
    if "tool_calls" in kept:
        calls = _merged(None, kept["tool_calls"], "tool_calls")
        calls = calls.values() if isinstance(calls, dict) else ()
        kept["tool_calls"] = [call for call in calls if isinstance(call, dict)]
    for call in kept.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:  # templates write the arguments as JSON again
                function["arguments"] = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                return None
    return kept if isinstance(kept["content"], str) else None


def _says(message: dict[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


class LoggedAnswers:
    """An engine that gives the answers of a log instead of generating them.

    Args:
        answers: of the requests that will come.
        stop_ids: the target's.
    """

    name = "log"

    def __init__(self, answers: Answers, stop_ids: Collection[int]) -> None:
        self._answers, self._stop_ids = answers, stop_ids

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        for request in requests:
            ids, ended = self._answers[request.prompt_ids]
            found = completed(request, ids, self._stop_ids)
            if found.finish_reason == "stop" and not ended:  # the end is the template's
                found = Completion(request, found.ids[:-1], "length")
            on_tokens(len(found.ids))
            yield found
