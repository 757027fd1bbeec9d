"""Tell this machine's own addresses from those of a network. Loads no torch."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address is the machine that says it, without asking a name server."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_is_chosen(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the user has said which network interface the ranks use: ``lo`` lets nodes be one machine."""
    return any(environment.get(f"{backend}_SOCKET_IFNAME") for backend in ("GLOO", "NCCL"))
