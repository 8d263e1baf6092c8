"""The Hub client's exceptions as one line that says what to do, without credentials."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._redact import redacted

# A server that answers nothing must not hold the command for ever; the client's default is no
# limit. It is a limit between two packets, not of a whole upload.
TIMEOUT_SECONDS = 60.0

# The client stands on httpx (huggingface_hub 1) or httpx2 (2): the package tells a network fault.
_NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")


def limit_waiting() -> None:
    """Give the client's session a timeout."""
    from huggingface_hub import get_session

    get_session().timeout = TIMEOUT_SECONDS


@contextlib.contextmanager
def hub_errors(doing: str, repo: str, *, after: str = "") -> Iterator[None]:
    """Turn what the Hub's client raises into `FastDraftError`.

    Args:
        doing: what was tried, such as ``"push"``; begins the message.
        repo: the repository's id.
        after: what to tell besides when the same command may simply be given again.
    """
    try:
        yield
    except FastDraftError:
        raise
    except Exception as error:
        message = _message(error, repo, after)
        if message is None:
            raise
        # No cause: its text may hold a request's headers.
        raise FastDraftError(f"{doing}: {redacted(message, _token())}") from None


def _token() -> str | None:
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def _message(error: Exception, repo: str, after: str) -> str | None:
    """Return the line for an exception of the client's, ``None`` for one that is not."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    again = "give the same command again" + (f"; {after}" if after else "")
    chain = _chain(error)

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((one for one in chain if isinstance(one, kinds)), None)

    if first(LocalTokenNotFoundError):
        return "no token: run `hf auth login`, or set HF_TOKEN"
    if first(OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    if first(HFValidationError):
        return f"'{repo}' is no id of the Hub, such as user/name"
    if first(GatedRepoError):
        return f"{repo} is gated; accept its terms on its page and run `hf auth login`"
    if first(RevisionNotFoundError):
        return f"{repo} has no such revision"
    if first(EntryNotFoundError) and not first(LocalEntryNotFoundError):
        return f"{repo} does not hold a file that is needed"
    if first(RepositoryNotFoundError):
        return f"the Hub has no {repo}, or the token may not see it (`hf auth login`)"
    http = first(HfHubHTTPError)
    if isinstance(http, HfHubHTTPError):
        return _of_status(http, repo, again)
    if first(OSError, EOFError) or any(_of_network(one) for one in chain):
        cause = next((one for one in reversed(chain) if str(one)), chain[-1])
        return f"the Hub could not be reached or broke off ({_short(cause)}); {again}"
    if first(json.JSONDecodeError):
        return f"the Hub's answer could not be read; {again}"
    if isinstance(error, ValueError) and "README.md" in str(error):
        return _short(error)
    return None


def _of_status(error: object, repo: str, again: str) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return "the Hub refuses the token (401); run `hf auth login` with one that may write"
    if status == 403:
        return f"the token may not write to {repo} (403): it needs write access there"
    if status in (409, 412):
        return f"{repo} was changed by somebody else meanwhile ({status}); {again}"
    if status == 400:
        return f"the Hub does not take this ({_short(error)})"
    return f"the Hub answered {status} ({_short(error)}); {again}"


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found


def _of_network(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _NETWORK_PACKAGES


def _short(error: object) -> str:
    """Return an exception's text as one line of at most 200 characters."""
    # Before it is cut: half of a token is not known for one any more.
    text = redacted(" ".join(str(error).split()), _token()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
