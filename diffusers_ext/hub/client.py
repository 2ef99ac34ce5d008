"""Requests to the Hub: retries of what the client sends once only, and errors of one sentence with a remedy."""

import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this huggingface_hub uses
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from diffusers.utils import logging

from diffusers_ext.hub import safety


logger = logging.get_logger(__name__)

Result = TypeVar("Result")

WAITS = (1, 2, 4, 8)  # seconds before the second to the fifth attempt, where the server does not ask for others
LONGEST_WAIT = 300  # seconds; a server that asks for more is not waited for
TRANSIENT = (408, 429, 500, 502, 503, 504)
COMMIT = re.compile(r"[0-9a-f]{40}")
# What the client raises; RuntimeError only with the cause of a failed upload.
CLIENT_ERRORS = (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, CachedRepoTreeNotFoundError, RuntimeError)
CLIENT_ERRORS += (json.JSONDecodeError,)


class HubError(OSError):
    """The Hub refused a request, cannot be reached, or sent something else than it promised."""


class PushConflictError(HubError):
    """Somebody else pushed while this push was under way; nothing was changed."""


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id("" if repo_id is None else repo_id)
    except HFValidationError as error:
        reason = safety.redact(str(error))
        raise ValueError(f"`repo_id` ({safety.show(repo_id)}) is no name of a repository: {reason}") from None
    _check_no_token("repo_id", repo_id)


def _check_no_token(argument: str, value: str) -> None:
    if safety.find_tokens(value):
        raise ValueError(f"`{argument}` ({safety.show(value)}) holds an access token; give that as `token`.")


def check_revision(revision: str | None) -> None:
    if revision is None:
        return
    parts = PurePosixPath(revision).parts
    if not revision or revision.startswith("/") or ".." in parts or re.search(r"[\x00-\x20\x7f\\~^:?*\[]", revision):
        raise ValueError(
            f"`revision` ({safety.show(revision)}) is no name of a branch, tag or commit; git allows letters, digits "
            "and single '/', '-', '_' and '.' between them."
        )
    _check_no_token("revision", revision)


def check_token(token: str | bool | None) -> str | bool | None:
    """A token as it was given. One with a stray character would stand in the error of the HTTP library."""
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ValueError(
            f"`token` ({len(token)} characters) must be one word of ASCII characters, as "
            "https://huggingface.co/settings/tokens shows it; it is empty, or holds a space, a line break, or others."
        )
    if token is True and get_token() is None:
        raise HubError("`token` is True, but nobody is logged in: run `hf auth login`, set HF_TOKEN, or pass a token.")
    return token


def has_token(token: str | bool | None) -> bool:
    return token is not False and (isinstance(token, str) or get_token() is not None)


def list_files(api: HfApi, repo_id: str, commit: str, repo_type: str = "model") -> dict[str, RepoFile]:
    entries = patiently(
        lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)),
        f"listing the files of {repo_id}",
    )
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def is_transient(error: BaseException) -> bool:
    """Whether the server is overloaded, broken, or cut off."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    return isinstance(error, (HTTPError, json.JSONDecodeError))


def was_refused(error: BaseException) -> bool:
    """Whether the server was too busy for a request, and certainly did not carry it out."""
    if not isinstance(error, HfHubHTTPError):
        return False
    status = error.response.status_code
    return status in (409, 429) or (status == 503 and "retry-after" in error.response.headers)


def patiently(
    request: Callable[[], Result], doing: str, again: Callable[[BaseException], bool] = is_transient
) -> Result:
    """The answer to a request, sent up to five times after errors that `again` holds for."""
    for wait in (*WAITS, None):
        try:
            return request()
        except (HTTPError, LocalEntryNotFoundError, json.JSONDecodeError) as error:
            cause = cause_of(error)
            pause = _pause(cause, wait) if wait is not None and again(cause) else None
            if pause is None:
                raise
            logger.warning("%s failed (%s). Trying again in %g s.", doing, reason_of(cause_of(error)), pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _pause(error: BaseException, wait: float) -> float | None:
    """Seconds until another attempt; None when the server asks for more than anybody waits for."""
    if not isinstance(error, HfHubHTTPError):
        return wait
    headers = error.response.headers
    limit = re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))  # as in `"api";r=0;t=55`
    asked = headers.get("retry-after") or (limit[1] if limit and error.response.status_code == 429 else "")
    seconds = float(asked) if asked.strip().isdigit() else wait
    return seconds if seconds <= LONGEST_WAIT else None


def cause_of(error: BaseException) -> BaseException:
    """What the client's own errors about a failed transfer stem from."""
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def one_sentence(repo_id: str, revision: str | None, token: str | bool | None) -> Iterator[None]:
    """Turns errors of the client into a `HubError` that says what happened and what to do, without any token."""
    try:
        yield
    except HubError:
        raise
    except CLIENT_ERRORS as error:
        cause = cause_of(error)
        if isinstance(cause, RuntimeError):
            raise
        told, secret = "".join(traceback.format_exception(error)), token if isinstance(token, str) else None
        sentence = safety.redact(_sentence(cause, repo_id, revision, token), secret)
        raise HubError(sentence) from (error if safety.redact(told, secret) == told else None)


def _sentence(error: BaseException, repo_id: str, revision: str | None, token: str | bool | None) -> str:
    what = f"`repo_id` ({repo_id!r})"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{what} cannot be reached: HF_HUB_OFFLINE is set. Unset it to use the network."
    if isinstance(error, (LocalEntryNotFoundError, CachedRepoTreeNotFoundError, IncompleteSnapshotError)):
        return (
            f"{what} is not in the cache, or not completely, and no request was made (`local_files_only` or "
            "HF_HUB_OFFLINE is set). Pull it once with the network."
        )
    if isinstance(error, json.JSONDecodeError):
        return f"{what}: {constants.ENDPOINT} answers with something else than the Hub's JSON. Is a proxy between?"
    if not isinstance(error, HfHubHTTPError):
        return f"{what}: the connection to the Hub at {constants.ENDPOINT} fails ({reason_of(error)}). Try again."
    status, reason = error.response.status_code, reason_of(error)
    login = "log in with `hf auth login`, set HF_TOKEN, or pass `token`"
    if isinstance(error, GatedRepoError):
        return (
            f"{what} is gated: its owner decides who may read it ({reason}). Ask for access at "
            f"{constants.ENDPOINT}/{repo_id}, and {login} of the account that has it."
        )
    if isinstance(error, RepositoryNotFoundError):
        if has_token(token):
            return f"{what} does not exist, or the token in use has no access to it ({reason})."
        return f"{what} does not exist, or is private: no token is in use ({reason}). For a private one, {login}."
    if isinstance(error, RevisionNotFoundError):
        return f"`revision` ({revision!r}) is no branch, tag or commit of {repo_id!r} ({reason})."
    if status == 401:
        return (
            f"{what}: the Hub does not accept the token in use ({reason}); it is wrong or has expired. Make a new one "
            f"at {constants.ENDPOINT}/settings/tokens, and {login}."
        )
    if status == 403:
        proposal = " `create_pr=True` proposes the change to its owner instead." if "create_pr" in reason else ""
        return f"{what}: the token in use has no right to do this ({reason}).{proposal}"
    if status == 429:
        asked = error.response.headers.get("retry-after")
        wait = f"{asked} seconds" if asked else "some minutes"
        return f"{what}: too many requests for the Hub ({reason}). Try again in {wait}."
    if status >= 500:
        return f"{what}: the Hub fails with status {status} ({reason}). Nothing is half done; try again later."
    return f"{what}: the Hub refuses with status {status} ({reason})."


def reason_of(error: BaseException) -> str:
    """The server's own words, or what the client says, in one line without tokens."""
    words = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return safety.redact(lines[0] if lines else type(error).__name__).rstrip(".")
