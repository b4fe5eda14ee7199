"""Conversations to token ids, and which of them an assistant said.

A template never sees what a message says: it is rendered, in a child process under hard limits,
with a sentinel in place of each content, and split at the sentinels. What the template wrote is
encoded with its special tokens, each content as plain text. So

- `<|eot|>` inside a user's message stays seven letters and four signs, never the end of a turn;
- the assistant's tokens are known without the template's help (`{% generation %}` is not needed);
- a hostile template is rendered once per sequence of roles, not once per row.

    template   <bos><user>␣ ⟨0⟩ <eot><assistant>␣ ⟨1⟩ <eot>
    trained                                       ███ █████

Templates that rewrite contents (as some do with earlier reasoning) do not rewrite them here, save
for surrounding white space, which is trimmed where the template trims it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ground import template_child
from ground.errors import DataError
from ground.records import Message

RENDER_SECONDS = 60.0
"""Wall-clock deadline of the child; its CPU limit ends a loop long before, on an idle machine."""

_EDGE = "\u2003"
"""An em space at both ends of a sentinel: gone from the output where the template trims."""
_SENTINEL = re.compile(f"({_EDGE}?)PACKTRAIN-CONTENT-(\\d+)-HERE({_EDGE}?)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hole:
    """The place of one message's content in the rendered conversation."""

    message: int
    trim_left: bool
    trim_right: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendered conversation without its contents: `parts[0]`, hole 0, `parts[1]`, hole 1, …

    Example:
        roles ("user",) → parts ("<bos><user>", "<eot><assistant>"), holes (Hole(0, False, False),)
    """

    parts: tuple[str, ...]
    part_ids: tuple[tuple[int, ...], ...]
    holes: tuple[Hole, ...]


class ChatTemplate:
    """A tokenizer's chat template, pinned: `fingerprint` tells one from another.

    Raises:
        DataError: no template, one that breaks its limits or drops messages, or a tokenizer whose
            pieces cannot be put together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._where = tokenizer.name_or_path or "tokenizer"
        self._source = _template_of(tokenizer, self._where)
        self._special_names = {
            name: str(token) for name, token in tokenizer.special_tokens_map.items()
        }
        backend = tokenizer.backend_tokenizer.to_str()
        self._with_specials = _plain_backend(backend)
        self._text_only = _plain_backend(backend)
        self._text_only.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._specials = {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.special_texts: tuple[str, ...] = tuple(
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        """The special tokens as they are written."""
        self._skeletons: dict[tuple[tuple[str, ...], bool], Skeleton] = {}
        self._bos_id = _added_bos(tokenizer)
        self.fingerprint = hashlib.sha256(
            json.dumps([self._source, self._special_names, backend]).encode()
        ).hexdigest()
        """sha256 of template, special tokens and vocabulary."""
        self._check_concatenation()
        self.end_of_turn = self._end_of_turn()
        self.stop_ids: tuple[int, ...] = tuple(
            sorted({self.end_of_turn} | _given(tokenizer.eos_token_id))
        )
        """Ids that end a completion: the template's end of turn and the tokenizer's eos."""
        self.pad_id: int = next(
            iter(_given(tokenizer.pad_token_id) or _given(tokenizer.eos_token_id)),
            self.end_of_turn,
        )

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant begins to speak."""
        return self._encode(messages, generation=True)[0]

    def encode_demonstration(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids of a whole conversation, and 1 where a token is to be trained.

        Trained are the contents of assistant turns and the token that ends each of them.
        """
        ids, mask = self._encode(messages, generation=False)
        if not any(mask):
            raise DataError(
                "a demonstration needs at least one assistant turn to train on, got roles "
                + ", ".join(message.role for message in messages),
                fix="end each row of the SFT data with an assistant message",
            )
        return ids, mask

    def encode_text(self, text: str) -> list[int]:
        """Ids of text as text: no BOS, and no special token whatever the text says."""
        try:
            return self._text_only.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise DataError(
                "a message must be valid Unicode text",
                why=f"{error}: {text[:40]!r}",
                fix="remove lone surrogates (\\ud800 to \\udfff) from the row",
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(
        self, messages: Sequence[Message], *, generation: bool
    ) -> tuple[list[int], list[int]]:
        """Fill the skeleton's holes; mask contents and ends of assistant turns with 1."""
        skeleton = self._skeleton(tuple(message.role for message in messages), generation)
        ids = list(skeleton.part_ids[0])
        mask = [0] * len(ids)
        for hole, part in zip(skeleton.holes, skeleton.part_ids[1:], strict=True):
            message = messages[hole.message]
            content = self.encode_text(_trimmed(message.content, hole))
            trained = message.role == "assistant"
            num_trained = self._turn_end(part) if trained else 0
            ids += [*content, *part]
            mask += [int(trained)] * len(content)
            mask += [1] * num_trained + [0] * (len(part) - num_trained)
        if self._bos_id is not None and ids[0] != self._bos_id:
            return [self._bos_id, *ids], [0, *mask]
        return ids, mask

    def _turn_end(self, part: tuple[int, ...]) -> int:
        """Tokens of the part behind an assistant content, up to and with the end of the turn."""
        return part.index(self.end_of_turn) + 1 if self.end_of_turn in part else 0

    def _skeleton(self, roles: tuple[str, ...], generation: bool) -> Skeleton:
        key = (roles, generation)
        if key not in self._skeletons:
            self._skeletons[key] = self._split(self._render(roles, generation), roles)
        return self._skeletons[key]

    def _split(self, text: str, roles: tuple[str, ...]) -> Skeleton:
        """Cut a rendered text at its sentinels; each message must be there exactly once."""
        pieces = _SENTINEL.split(text)
        parts, lefts, numbers, rights = pieces[0::4], pieces[1::4], pieces[2::4], pieces[3::4]
        holes = [
            Hole(int(number), trim_left=not left, trim_right=not right)
            for left, number, right in zip(lefts, numbers, rights, strict=True)
        ]
        found = sorted(hole.message for hole in holes)
        if found != list(range(len(roles))):
            raise self._bad(
                f"the chat template must write each message once; of roles {', '.join(roles)} "
                f"it wrote {found or 'none'}",
                fix="use only the roles that the template knows, or another template",
            )
        part_ids = [
            tuple(self._with_specials.encode(p, add_special_tokens=False).ids) for p in parts
        ]
        if self._bos_id is not None and part_ids[0][:2] == (self._bos_id, self._bos_id):
            raise self._bad("the chat template writes BOS twice", fix="write bos_token once")
        return Skeleton(tuple(parts), tuple(part_ids), tuple(holes))

    def _render(self, roles: tuple[str, ...], generation: bool) -> str:
        """Render sentinels in a child that the kernel or the deadline stops."""
        messages = [
            {"role": role, "content": f"{_EDGE}PACKTRAIN-CONTENT-{index}-HERE{_EDGE}"}
            for index, role in enumerate(roles)
        ]
        variables = {
            **self._special_names,
            "messages": messages,
            "add_generation_prompt": generation,
            "tools": None,
            "documents": None,
        }
        try:
            child = subprocess.run(
                [sys.executable, "-I", str(Path(template_child.__file__))],
                input=json.dumps({"template": self._source, "variables": variables}),
                capture_output=True,
                text=True,
                timeout=RENDER_SECONDS,
                env={},
            )
        except subprocess.TimeoutExpired as error:
            raise self._bad(f"the chat template rendered for {RENDER_SECONDS:.0f} s") from error
        if child.returncode < 0:
            raise self._bad(
                f"the chat template needed more than {template_child.MAX_CPU_SECONDS} s of CPU time"
            )
        if child.returncode > 0:
            raise self._bad("the chat template could not be rendered", why=child.stderr[-300:])
        reply: dict[str, str] = json.loads(child.stdout)
        if "error" in reply:
            raise self._bad(
                f"the chat template fails on roles {', '.join(roles)}", why=reply["error"]
            )
        return reply["text"]

    def _end_of_turn(self) -> int:
        """The special token that the template puts behind what an assistant said."""
        whole = self._skeleton(("user", "assistant"), generation=False)
        if whole.parts[1] != self._skeleton(("user",), generation=True).parts[1]:
            logger.warning(
                "%s: the template opens an assistant turn otherwise in a prompt than in a finished "
                "conversation, so training and sampling see different contexts",
                self._where,
            )
        for token_id in whole.part_ids[2]:
            if token_id in self._specials:
                return token_id
        raise self._bad(
            "the chat template must end an assistant turn with a special token",
            why=f"behind the assistant's text it writes {whole.parts[2]!r}; "
            "a model trained on it would never stop",
            fix="write the end-of-turn or eos token behind each assistant message",
        )

    def _check_concatenation(self) -> None:
        """Pieces are encoded apart; a tokenizer that adds a space to each would alter the text."""
        if self.decode(self.encode_text("a") + self.encode_text("b")) != "ab":
            raise self._bad(
                "the tokenizer must encode pieces of text independently",
                why="it puts a space in front of every piece",
                fix="use a model with a byte-level tokenizer, as Llama 3 and 4 have",
            )

    def _bad(self, what: str, *, why: str = "", fix: str = "") -> DataError:
        fix = fix or "use the template that was published with the model"
        return DataError(what, where=self._where, why=why, fix=fix)


def _template_of(tokenizer: PreTrainedTokenizerFast, where: str) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise DataError(
            "the tokenizer has no chat template",
            where=where,
            fix="put chat_template.jinja beside tokenizer.json; base models often lack it, their "
            "instruct siblings have it",
        )
    return template


def _plain_backend(serialised: str) -> Tokenizer:
    """An own copy of the tokenizer, so that its switches are nobody else's."""
    backend = Tokenizer.from_str(serialised)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _added_bos(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The BOS that the tokenizer itself would put in front of a text, if it does."""
    first = tokenizer("a").input_ids[:1]
    return first[0] if first == [tokenizer.bos_token_id] else None


def _given(token_id: object) -> set[int]:
    return {token_id} if isinstance(token_id, int) else set()


def _trimmed(content: str, hole: Hole) -> str:
    content = content.lstrip() if hole.trim_left else content
    return content.rstrip() if hole.trim_right else content
