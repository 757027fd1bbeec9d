"""huggingface_hub: whether the hub can be reached, found out once a process; where it cannot, no library asks it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from functools import cache
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from trainer.compat import need, reach

CONNECT_SECONDS = 4.0
"""What a connection may take, the look-up of the name with it: a hub that needs more cannot be used."""
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

logger = logging.getLogger(__name__)


@cache
def hub_obstacle() -> str | None:
    """Return why the hub cannot be asked, in words; ``None`` where it can be.

    Looks once: where the hub is not reached, the libraries are set to take what is cached, as by ``HF_HUB_OFFLINE=1``.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return f"{next((name for name in OFFLINE_VARIABLES if os.environ.get(name)), OFFLINE_VARIABLES[0])} is set"
    reason = connect(urlsplit(constants.ENDPOINT))
    if reason is None:
        quiet_retries()
        return None
    go_offline()
    return f"the hub cannot be reached ({constants.ENDPOINT}: {reason})"


def was_not_reached(error: BaseException | None) -> bool:
    """Return whether a library has failed because something is not cached, and the hub has not given it either: it does
    not raise so where the hub itself says that there is no such thing."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = LocalEntryNotFoundError.__name__
    while error is not None and not isinstance(error, LocalEntryNotFoundError) and name not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def why_not_reached() -> str:
    """Return why the hub has not given something, in words."""
    from huggingface_hub import constants

    return hub_obstacle() or f"what answers at {constants.ENDPOINT} is no hub"


def is_obstacle_asked_for() -> bool:
    """Return whether it was the user who has set the libraries offline."""
    return (hub_obstacle() or "").endswith(" is set")


def hub_hint(key: str, name: str, command: str = "hf download") -> str:
    """Return what to do where the hub cannot be asked and something is not cached.

    Args:
        key: that names it.
        name: its id.
        command: what fetches it where there is a network.
    """
    if is_obstacle_asked_for():
        return f"{key}=FOLDER of one that is here; or HF_HUB_OFFLINE=0 where there is a network"
    elsewhere = f"`{command} {name}` where there is a network, and HF_HUB_OFFLINE=1 here with that cache (HF_HOME)"
    return f"{key}=FOLDER of one that is here; HF_ENDPOINT=URL of a mirror; or {elsewhere}"


@reach("huggingface_hub.constants.HF_HUB_OFFLINE", until="huggingface_hub can be set offline in a running process")
def go_offline() -> None:
    """Set huggingface_hub, and datasets where it is loaded, offline: transformers asks the former at each call."""
    from huggingface_hub import constants

    need("huggingface_hub", constants, "HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE = True
    if (config := sys.modules.get("datasets.config")) is not None:
        config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


@reach("the log messages of huggingface_hub.utils._http", until="huggingface_hub says once that it tries again")
def quiet_retries() -> None:
    """Say once that the hub does not answer, in place of two lines for each try."""
    messages = logging.getLogger("huggingface_hub.utils._http")
    if not any(isinstance(each, _Once) for each in messages.filters):
        messages.addFilter(_Once())


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._is_told = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_failure = " thrown while requesting " in text
        if is_failure and not self._is_told:
            self._is_told = True
            logger.warning(f"the hub does not answer ({text.partition(' thrown')[0]}); trying again for half a minute")
        return not is_failure and "[Retry " not in text


def connect(url: SplitResult) -> str | None:
    """Open a connection to a server, or to the proxy before it; return why it cannot be opened."""
    host = url.hostname or ""
    proxies = {} if proxy_bypass(host) else getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy:
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    place = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    found: list[str | None] = []
    # the look-up of a name heeds no timeout: it is left behind with its thread
    thread = threading.Thread(target=lambda: found.append(_try(place)), daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    reason = found[0] if found else f"no answer within {CONNECT_SECONDS:g} s"
    return f"through the proxy {place[0]}: {reason}" if reason and proxy else reason


def _try(place: tuple[str, int]) -> str | None:
    try:
        socket.create_connection(place, timeout=CONNECT_SECONDS).close()
    except TimeoutError:
        return f"no answer within {CONNECT_SECONDS:g} s"
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
