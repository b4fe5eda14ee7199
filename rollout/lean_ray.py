"""Ray on one machine without two processes that have nothing to do there.

The autoscaler's monitor has no machine to add, and the log monitor nobody to forward logs to
(`log_to_driver=False`; workers' files are written all the same). Each is a Python process: together
a second and a half of a core and 160 MB in every life of the loop. `ray start` has switches for
both, `ray.init` has none, so they are set where it makes its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private.parameter import RayParams


@contextmanager
def lean_ray() -> Iterator[None]:
    """In the body `ray.init` starts a head without them.

    Example:
        with lean_ray(): ray.init(address="local")
    """
    plain = RayParams.__init__

    def lean(self: RayParams, *positional: Any, **named: Any) -> None:
        plain(self, *positional, **named)
        vars(self).update(no_monitor=True, include_log_monitor=False)

    RayParams.__init__ = lean
    try:
        yield
    finally:
        RayParams.__init__ = plain
