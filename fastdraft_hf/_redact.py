"""Credentials removed from everything that is printed or written."""

from __future__ import annotations

import re

# Hub tokens, and a value that a user wrote as `...token=value` or `...key=value`.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|((?:token|key|secret|password)=)\S+", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def redacted(text: str, *secrets: str | None) -> str:
    """Replace ``secrets``, and whatever looks like a credential, by ``[redacted]``."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[redacted]")
    return _SECRET.sub(lambda match: (match.group(1) or "") + "[redacted]", text)


def holds_token(text: str, *secrets: str | None) -> bool:
    """Return whether ``text`` contains a Hub token or one of ``secrets``."""
    return bool(_HUB_TOKEN.search(text)) or any(s in text for s in secrets if s)
