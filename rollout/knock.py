"""Asks a Ray cluster what it runs: `python -m rollout.knock ADDRESS`,
in a process that may be killed.

out: one line of JSON with `ray` and `python`, or `refusal`, or `silence` (rollout/preflight.py)
"""

from __future__ import annotations

import json
import socket
import sys

from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import AuthenticationError, RayError

_CONNECT_SECONDS = 5.0


def main() -> int:
    """Ask with the environment that this process has."""
    sys.stdout.write(json.dumps(_ask(sys.argv[1])) + "\n")
    return 0


def _ask(address: str) -> dict[str, str]:
    try:
        found = canonicalize_bootstrap_address_or_die(address)
        host, _, port = found.rpartition(":")
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        versions = get_cluster_metadata(GcsClient(address=found))
    except AuthenticationError as error:
        return {"refusal": str(error).partition(". ")[0]}
    except (OSError, ValueError, RayError) as error:
        return {"silence": str(error)}
    return {"ray": versions["ray_version"], "python": versions["python_version"]}


if __name__ == "__main__":
    sys.exit(main())
