"""Text of others inside our own: quoted between marks that carry a code which it cannot know.

The code is a keyed hash of all that is quoted, so a text that contains its own code, and with it
could close the quotation, would be a fixed point of the hash: some 2^48 tries for one who knows the
key. Equal requests have equal codes, so what a model says of them can be repeated bit for bit.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence

_DIGITS = 12


def code_of(secret: bytes, content: Sequence[str | int]) -> str:
    """What stands in the marks around this content.

    Args:
        secret: keys the hash; a run's own.
    """
    written = json.dumps(list(content)).encode()
    return hmac.new(secret, written, hashlib.sha256).hexdigest()[:_DIGITS]


def quoted(name: str, text: str, code: str) -> str:
    """A text between its marks.

    Example:
        quoted("answer", "Paris", "5e88…") → [5e88… answer] ⏎ Paris ⏎ [5e88… end]
    """
    return f"[{code} {name}]\n{text}\n[{code} end]"
