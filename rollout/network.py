"""Which network groups of processes speak over: the one that Ray speaks over."""

from __future__ import annotations

import os
from collections.abc import Mapping

import psutil
import ray


def interface_of(ip: str, addresses: Mapping[str, list[str]]) -> str:
    """The network interface that has an address; empty where none has.

    Example:
        interface_of("10.0.0.7", {"lo": ["127.0.0.1"], "eth1": ["10.0.0.7"]}) → "eth1"
    """
    return next((name for name, own in addresses.items() if ip in own), "")


def transport() -> dict[str, str]:
    """Have gloo and NCCL speak over the network that Ray speaks over on this machine.

    Left alone gloo takes the one that the machine's own name leads to, often the loopback.
    """
    own = {name: [each.address for each in of] for name, of in psutil.net_if_addrs().items()}
    found = interface_of(ray.util.get_node_ip_address(), own)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ.get(name, found) for name in names if found or name in os.environ}
