"""The one exception type for bad input, and credentials removed from printed and written text."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

_NAME = r"(?:(?:push_to_)?hub_|api_|access_|auth_|hf_)?token|api_?key|passw(?:or)?d|secret"
# What is a credential by its form or by its name.
_FORMS = rf"""
    \bhf_(?:(?:oauth|jwt)_[\w.-]{{8,}} | [a-z0-9]{{20,}}) | \bapi_org_[a-z0-9]{{16,}}  # the Hub
  | \bsk-(?=[\w-]*\d)[\w-]{{16,}}                     # OpenAI, Anthropic
  | \bgh[pousr]_[a-z0-9]{{20,}} | \bgithub_pat_\w{{20,}}
  | \bAKIA[0-9A-Z]{{16}}\b                             # AWS
  | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----
  # user:password@ of a URL, at most 200 characters
  | (?<=://)(?:[^\s/:"'<>]{{,99}}:(?!\d+/)[^\s"'<>]{{,99}}|[^\s/"'<>]{{,200}})@
  | [?&\#;][\w-]{{,99}}(?:token|key|secret|password|signature)=[^\s&"'<>]+
  | \bbearer\s+(?:(?=\S{{,200}}\d)[\w.~+/=-]{{8,}}|[\w.~+/=-]{{16,}})
  | (["'])(?:{_NAME}|authorization)\1\s*:\s*(["'])[^"'\s]{{8,}}\2
"""
_SECRET = re.compile(_FORMS, re.IGNORECASE | re.VERBOSE)
_SECRET_KEY = re.compile(rf"(?:{_NAME}|authorization)$", re.IGNORECASE)
# In a message also what was cut off, and a value that a user wrote as `...key=value`.
_SHOWN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|((?:token|key|secret|password)=)\S+", re.IGNORECASE)


class FastDraftError(ValueError):
    """Bad input, or a condition the user can fix. The command line prints it as one line."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the valid name closest to ``name``, else ``""``."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def redacted(text: str, *secrets: str | None) -> str:
    """Replace ``secrets``, and whatever looks like a credential, by ``[redacted]``."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[redacted]")
    text = _SECRET.sub("[redacted]", text)
    return _SHOWN.sub(lambda match: (match.group(1) or "") + "[redacted]", text)


def change_texts(value: Any, change: Callable[[str], str] = redacted) -> Any:
    """Return JSON data with every text in it, keys too, passed through ``change``."""
    if isinstance(value, dict):
        return {change(str(key)): change_texts(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [change_texts(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def holds_secret(text: str, *secrets: str | None) -> bool:
    """Return whether ``text`` contains one of ``secrets``, or what looks like a credential."""
    return bool(_SECRET.search(text)) or any(s in text for s in secrets if s)


def refuse_secrets(value: Any, where: str = "") -> None:
    """Raise `FastDraftError` for a credential in settings, whose key is ``where``."""
    if isinstance(value, dict | list | tuple | set):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            refuse_secrets(str(key), f"{where or 'the recipe'}, a key")
            refuse_secrets(entry, f"{where}.{key}" if where else str(key))
    elif value and isinstance(value, str):
        named = _SECRET_KEY.match(where.rpartition(".")[2])
        if named or holds_secret(value):
            key = "VLLM_API_KEY" if "server" in where else "HF_TOKEN, or run `hf auth login`"
            raise FastDraftError(
                f"{redacted(where)}: a token or password does not belong in a recipe, which is "
                f"printed and kept. Leave it out and set the environment variable {key}"
            )
