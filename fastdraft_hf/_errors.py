"""The one exception type for bad input, and credentials removed from printed and written text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Hub tokens, and a value that a user wrote as `...token=value` or `...key=value`.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|((?:token|key|secret|password)=)\S+", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


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
    return _SECRET.sub(lambda match: (match.group(1) or "") + "[redacted]", text)


def holds_token(text: str, *secrets: str | None) -> bool:
    """Return whether ``text`` contains a Hub token or one of ``secrets``."""
    return bool(_HUB_TOKEN.search(text)) or any(s in text for s in secrets if s)
