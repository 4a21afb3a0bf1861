"""What goes wrong between here and the hub, as messages with a fix."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import UserError, listing, looks_local, near_path
from lorakit.hub.ids import MODELS, HubId

# Client libraries differ between huggingface_hub's versions (requests, httpx): what they raise
# when a connection fails is known by the names in its family.
_CONNECTION_ERRORS = {"TransportError", "RequestException", "ConnectionError", "TimeoutError"}


@contextmanager
def explained(hub_id: HubId) -> Iterator[None]:
    """Turns what the block raises into a UserError, if it is the hub's, the network's or the
    disk's doing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = explain(error, hub_id)
        if found is None:
            raise
        raise found from error


def explain(error: Exception, hub_id: HubId) -> UserError | None:
    """The message for an exception of huggingface_hub; None if it is not of its kind."""
    return _of_the_hub(error, hub_id) or _of_the_machine(error, hub_id)


def _of_the_hub(error: Exception, hub_id: HubId) -> UserError | None:
    """What the hub answered."""
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{hub_id.page}"
    where = f"{hub_id.key}: {hub_id}"
    found = None
    if isinstance(error, errors.GatedRepoError):
        found = UserError(
            f"{where} is gated: its owner asks for consent, and {_who()} has not been let in",
            f"Accept its licence at {address}, make a token at "
            f"{constants.ENDPOINT}/settings/tokens, and set HF_TOKEN to it.",
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        found = UserError(
            f"{where}: {hub_id.repo} has no revision {hub_id.revision or 'main'!r}",
            f"See its branches, tags and commits at {address}/tree/main.",
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = _no_repository(hub_id, address)
    elif isinstance(error, errors.HfHubHTTPError):
        found = _refused(error, where, address)
    return found


def _of_the_machine(error: Exception, hub_id: HubId) -> UserError | None:
    """What stands in the way on this side: no network, no room."""
    from huggingface_hub import constants, errors

    where = f"{hub_id.key}: {hub_id}"
    found = None
    if isinstance(error, errors.OfflineModeIsEnabled):
        found = _out_of_reach(
            hub_id,
            f"not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set",
            "Run it once with HF_HUB_OFFLINE=0, or set HF_HOME to where it was downloaded.",
        )
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        found = disk_full(where)
    elif is_connection_error(error) or isinstance(error, errors.LocalEntryNotFoundError):
        found = _out_of_reach(
            hub_id,
            f"no connection to {constants.ENDPOINT} ({_short(error)})",
            "Check the network, and HF_ENDPOINT if it is set; run it again, and it goes on with "
            "what is there already.",
        )
    elif isinstance(error, OSError):
        found = UserError(
            f"{where}: cannot be kept in {constants.HF_HUB_CACHE}: {_short(error)}",
            "Set HF_HOME to a directory that can be written to.",
        )
    return found


def is_connection_error(error: Exception) -> bool:
    """Whether the network failed, in whichever client library."""
    return bool(_CONNECTION_ERRORS & {base.__name__ for base in type(error).__mro__})


def disk_full(where: str, sizes: str = "") -> UserError:
    """The cache's disk has no room."""
    from huggingface_hub import constants

    return UserError(
        f"{where}: no room on the disk of {constants.HF_HUB_CACHE}{sizes}",
        "Make room there, or set HF_HOME to a directory on another disk.",
    )


def _no_repository(hub_id: HubId, address: str) -> UserError:
    return UserError(
        f"{hub_id.key}: {hub_id}: no such path here{near_path(Path(str(hub_id)))}, and no such "
        f"{_kind(hub_id)} on the hub ({address})",
        "Check the spelling. If it is private, set HF_TOKEN to a token of an account that may "
        "read it.",
    )


def _refused(error: Exception, where: str, address: str) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UserError(
            f"{where}: the hub refuses {_who()} (status {status})",
            f"Set HF_TOKEN to a valid token of an account that may read {address}.",
        )
    if status == 404:
        return UserError(
            f"{where}: the hub no longer has a file that it lists (status 404)", f"See {address}."
        )
    return UserError(
        f"{where}: the hub does not answer as it should (status {status})",
        "Run it again in a while: it goes on with what is there already.",
    )


def _who() -> str:
    from huggingface_hub import get_token

    return "the account of the token in use" if get_token() else "a request without a token"


def _out_of_reach(hub_id: HubId, why: str, fix: str) -> UserError:
    """Nobody knows whether the hub has it; what is known is that nothing here is called so."""
    path, where = Path(str(hub_id)), f"{hub_id.key}: {hub_id}"
    if looks_local(path):
        return UserError(
            f"{where}: no such path here{_nearest(path)}; as a {_kind(hub_id)} on the hub: {why}",
            f"Check the spelling. If it is on the hub: {fix[0].lower()}{fix[1:]}",
        )
    return UserError(f"{where}: {why}; no such path here either", fix)


def _nearest(path: Path) -> str:
    near = near_path(path)
    if near or not path.parent.is_dir():
        return near
    there = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    rest = [f"{len(there) - 5} more"] if len(there) > 6 else []
    return f" ({path.parent} holds {listing([*there[: 5 if rest else 6], *rest], 'nothing')})"


def _kind(hub_id: HubId) -> str:
    return "model" if hub_id.kind == MODELS else "data set"


def _short(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
