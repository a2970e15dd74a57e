"""What stages share of the Hugging Face hub: one sentence for each way in which it can fail, and no telemetry.

Downloads themselves are huggingface_hub's and datasets' own calls, at a pinned commit. It reads no token and no cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from huggingface_hub import constants, errors

from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from tasks.parameters.source_sections import ModelSource

constants.HF_HUB_DISABLE_TELEMETRY = True  # the environment counts only before huggingface_hub's first import


@contextmanager
def failures(what: str, source: ModelSource) -> Iterator[None]:
    """Turn a failure of the hub into an InputError.

    Args:
        what: "model" or "data set".
    """
    name = f"{what} {source.hub}"
    try:
        yield
    except Exception as error:  # httpx's, the hub's and `datasets`' errors have no base of their own
        raise InputError(_sentence(name, source, error)) from error


def _sentence(name: str, source: ModelSource, error: Exception) -> str:
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the hub answered, and the files aren't in the local cache either
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: ask for access on its page, then `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no commit {source.revision}; copy the 40-digit one from its history"
    if status in (401, 403, 404) or type(error).__name__ == "DatasetNotFoundError":
        return (
            f"the hub has no {name} at {source.revision}, or it is private or gated;"
            " check name and revision, or `hf auth login`"
        )
    if status is not None:
        return f"the hub answered {status} for {name}; try again later"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError)):
        return f"the hub can't be reached for {name}; go online, or name a local folder or file"
    return f"{name} can't be loaded: {line(error)}"


def line(error: BaseException) -> str:
    """The first line of a library's message, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
