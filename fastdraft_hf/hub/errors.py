"""The Hub client's exceptions as one line that says what to do, without credentials."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from fastdraft_hf._errors import FastDraftError, redacted

# The client waits without a limit by default. This one is between two packets, not for an upload.
TIMEOUT_SECONDS = 60.0

# huggingface_hub 1 uses httpx, version 2 uses httpx2: the package marks a network fault.
_NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet"}


@contextlib.contextmanager
def hub_errors(doing: str, repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into `FastDraftError`, and set the client's timeout.

    Args:
        doing: the command, such as ``"push"``; starts the message.
        repo_id: the repository.
    """
    from huggingface_hub import get_session, get_token

    try:
        get_session().timeout = TIMEOUT_SECONDS
        yield
    except FastDraftError:
        raise
    except Exception as error:
        line = _line(_chain(error), repo_id)
        if line is None:
            raise
        # No cause: its text may contain a request's headers.
        raise FastDraftError(f"{doing}: {redacted(line, get_token())}") from None


def _line(chain: list[BaseException], repo_id: str) -> str | None:
    """Return the message for an exception and its causes; ``None``: it is not the client's."""
    from huggingface_hub import errors

    known: dict[type[BaseException], str] = {
        errors.LocalTokenNotFoundError: "no token: run `hf auth login`, or set HF_TOKEN",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it to reach the Hub",
        errors.HFValidationError: f"'{repo_id}' is not a repository id such as user/name",
        errors.GatedRepoError: f"{repo_id} is gated: accept its terms on its page, then run "
        "`hf auth login`",
        errors.RevisionNotFoundError: f"{repo_id} has no such revision",
        errors.RepositoryNotFoundError: f"the Hub has no {repo_id}, or the token may not see it "
        "(`hf auth login`)",
    }
    for kind, message in known.items():
        if any(isinstance(error, kind) for error in chain):
            return message
    again = "run the same command again; files already transferred are kept"
    for error in chain:
        if isinstance(error, errors.HfHubHTTPError):
            status = int(getattr(error.response, "status_code", 0))
            return {
                400: f"the Hub refuses the content ({_short(error)})",
                401: "the Hub refuses the token (401); run `hf auth login` with a write token",
                403: f"the token may not write to {repo_id} (403); it needs write access there",
                **dict.fromkeys((409, 412), f"somebody else changed {repo_id} meanwhile; {again}"),
            }.get(status, f"the Hub answered {status} ({_short(error)}); {again}")
    if any(
        isinstance(error, (OSError, EOFError))
        or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES
        for error in chain
    ):
        cause = next((error for error in reversed(chain) if str(error)), chain[-1])
        return f"the Hub could not be reached or broke off ({_short(cause)}); {again}"
    if any(isinstance(error, json.JSONDecodeError) for error in chain):
        return f"the Hub's answer could not be read; {again}"
    if isinstance(chain[0], ValueError) and "README.md" in str(chain[0]):
        return _short(chain[0])
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _short(error: BaseException) -> str:
    """Return an exception's text as one line of at most 200 characters."""
    from huggingface_hub import get_token

    # Redact before cutting: half of a token is not recognized.
    text = redacted(" ".join(str(error).split()), get_token()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
