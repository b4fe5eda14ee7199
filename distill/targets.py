"""What a teacher says in place of tokens, in the three forms in which it can be kept.

    full        all V log-probs; the reference, for small vocabularies
    topk_tail   the K likeliest and the probability of all others together: K + 1 outcomes. Its KL
                is never above the full KL, and the gradient of what is kept is not biased; that of
                a renormalised top-k is, by 30 to 200 % where the teacher is flat
    sampled     the likeliest as they are, and draws from the rest, weighted by how often they came
                (arXiv 2503.16870 draws from all): the gradient's expectation is that of `full`

The realised token always comes first, then come the tokens that the format names; both are kept as
they are.

T tokens in place of which the teacher spoke, K outcomes that are kept of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import FormatKind, WordSection

NO_TOKEN = -1
"""Id of an outcome that is not used; its log-prob is -inf."""
_ID_BYTES, _LOGPROB_BYTES = 4, 2
_MOST = 1e-2
"""Log-probs may be above 0 by what half precision rounds."""


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """The teacher's word on T tokens of a sequence, or of several, one behind the other.

    Example:
        topk_tail, realised 7 with p = 0.2, likeliest 5 with p = 0.7:
        ids [[7, 5]], logprobs [[ln 0.2, ln 0.7]], tail [ln 0.1], realised [ln 0.2]
    """

    kind: FormatKind
    ids_TK: Tensor | None
    """None for `full`, whose column is the id."""
    logprobs_TK: Tensor
    """In nats at the format's temperature; of `sampled` the logarithm of a draw's weight."""
    tail_T: Tensor
    """Log-prob of all outcomes that are not kept, together; -inf where nothing is left."""
    realised_T: Tensor
    """Log-prob of the sequence's own token; -inf where the teacher gives it none."""
    entropy_T: Tensor
    """Of the teacher's whole distribution, whatever is kept of it."""

    def __len__(self) -> int:
        return len(self.logprobs_TK)

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        """ids, logprobs, tail, realised and entropy."""
        return self.ids_TK, self.logprobs_TK, self.tail_T, self.realised_T, self.entropy_T

    @property
    def is_supported_T(self) -> Tensor:
        """Where the teacher gives the sequence's own token a probability."""
        return torch.isfinite(self.realised_T)

    def to(self, device: torch.device) -> TeacherTargets:
        """The same on a device."""
        ids_TK = None if self.ids_TK is None else self.ids_TK.to(device)
        rest = (self.logprobs_TK, self.tail_T, self.realised_T, self.entropy_T)
        return TeacherTargets(self.kind, ids_TK, *(tensor.to(device) for tensor in rest))

    def slice(self, part: slice) -> TeacherTargets:
        """Some of the tokens."""
        ids_TK = None if self.ids_TK is None else self.ids_TK[part]
        rest = (self.logprobs_TK, self.tail_T, self.realised_T, self.entropy_T)
        return TeacherTargets(self.kind, ids_TK, *(tensor[part] for tensor in rest))


@dataclass(frozen=True, slots=True)
class TargetFormat:
    """How much of a teacher's distribution is kept.

    Example:
        TargetFormat("topk_tail", count=64, always=(200008,)): 66 outcomes and the tail
        TargetFormat("sampled", count=32, exact=32): 33 outcomes as they are, and 32 draws
    """

    kind: FormatKind
    count: int = 0
    """Likeliest tokens of `topk_tail`, draws of `sampled`."""
    exact: int = 0
    """Likeliest tokens of `sampled`, which are not left to the draws."""
    always: tuple[int, ...] = ()
    """Tokens that are kept beside the realised one: end of turn, tool opener, refusal opener."""
    temperature: float = 1.0
    """The teacher's logits are divided by it, and so must the student's be."""

    @classmethod
    def of(cls, section: WordSection, always: tuple[int, ...]) -> TargetFormat:
        """The format that a recipe asks for, its tokens as ids."""
        counts = {"full": 0, "topk_tail": section.k, "sampled": section.draws}
        kept = () if section.format == "full" else tuple(sorted(set(always)))
        exact = section.k if section.format == "sampled" else 0
        return cls(section.format, counts[section.format], exact, kept, section.temperature)

    def __str__(self) -> str:
        words = [self.kind]
        words += [f"{'k' if self.kind == 'topk_tail' else 'draws'}={self.count}"] * bool(self.count)
        words += [f"k={self.exact}"] * bool(self.exact)
        words += [f"always={','.join(map(str, self.always))}"] * bool(self.always)
        words += [f"temperature={self.temperature:g}"] * (self.temperature != 1)
        return " ".join(words)

    def width(self, vocabulary: int) -> int:
        """K, the outcomes of a token."""
        if self.kind == "full":
            return vocabulary
        if self.kind == "topk_tail":
            return self._num_kept(self.count, vocabulary)
        return self._num_kept(self.exact, vocabulary) + self.count

    def bytes_per_token(self, vocabulary: int) -> int:
        """What the store keeps for a token."""
        ids = 0 if self.kind == "full" else _ID_BYTES
        return self.width(vocabulary) * (ids + _LOGPROB_BYTES) + 3 * _LOGPROB_BYTES

    def make(
        self, logits_TV: Tensor, realised_T: Tensor, generator: torch.Generator | None = None
    ) -> TeacherTargets:
        """Keep what this format keeps.

        Args:
            logits_TV: the teacher's, over the tokenizer's ids.
            realised_T: the sequence's own token at each place.
            generator: of the draws; needed by `sampled`.
        """
        logprobs_TV = (logits_TV.float() / self.temperature).log_softmax(-1)
        if self.kind == "full":
            ids_TK, kept_TK, tail_T = (
                None,
                logprobs_TV,
                torch.full_like(logprobs_TV[:, 0], -torch.inf),
            )
        elif self.kind == "topk_tail":
            ids_TK, kept_TK, tail_T = self._likeliest(logprobs_TV, realised_T, self.count)
        else:
            ids_TK, kept_TK, tail_T = self._drawn(logprobs_TV, realised_T, generator)
        realised_logprob_T = logprobs_TV.gather(1, realised_T[:, None])[:, 0]
        entropy_T = torch.special.entr(logprobs_TV.exp()).sum(-1)
        return TeacherTargets(self.kind, ids_TK, kept_TK, tail_T, realised_logprob_T, entropy_T)

    def _num_kept(self, likeliest: int, vocabulary: int) -> int:
        """Tokens that are kept as they are."""
        return min(1 + len(self.always) + likeliest, vocabulary)

    def _likeliest(
        self, logprobs_TV: Tensor, realised_T: Tensor, likeliest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The realised token, the named ones, the likeliest others; and the mass of the rest."""
        lowest = torch.finfo(logprobs_TV.dtype).min
        scores_TV = logprobs_TV.clamp(min=lowest)
        if self.always:
            scores_TV[:, list(self.always)] = torch.inf
        scores_TV.scatter_(1, realised_T[:, None], -torch.inf)
        others = self._num_kept(likeliest, logprobs_TV.shape[1]) - 1
        ids_TK = torch.cat([realised_T[:, None], scores_TV.topk(others, dim=-1).indices], dim=1)
        tail_T = logprobs_TV.scatter(1, ids_TK, -torch.inf).logsumexp(-1)
        return ids_TK, logprobs_TV.gather(1, ids_TK), tail_T

    def _drawn(
        self, logprobs_TV: Tensor, realised_T: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept as it is, and draws from all others.

        The draws share the mass of the others in equal parts, so that the expectation of every
        weight is the token's probability.
        """
        if generator is None:
            raise ValueError("sampled targets need a generator, so that they can be made again")
        exact_TE, exact_logprobs_TE, mass_T = self._likeliest(logprobs_TV, realised_T, self.exact)
        others_TV = logprobs_TV.scatter(1, exact_TE, -torch.inf)
        odds_TV = others_TV.softmax(-1).nan_to_num(1.0)  # where nothing is left the weight is 0
        draws_TD = torch.multinomial(odds_TV, self.count, replacement=True, generator=generator)
        drawn_TD, counts_TD = _counted(draws_TD)
        weights_TD = mass_T[:, None] + (counts_TD / self.count).log()
        ids_TK = torch.cat([exact_TE, drawn_TD], dim=1)
        logprobs_TK = torch.cat([exact_logprobs_TE, weights_TD], dim=1)
        ids_TK = ids_TK.masked_fill(logprobs_TK == -torch.inf, NO_TOKEN)
        ids_TK[:, 0] = realised_T
        return ids_TK, logprobs_TK, torch.full_like(mass_T, -torch.inf)


def joined(parts: Sequence[TeacherTargets]) -> TeacherTargets:
    """Several targets of one format, one behind the other."""
    first = parts[0]
    if any(part.kind != first.kind for part in parts):
        raise ValueError("targets of different formats cannot be joined")
    ids = [part.ids_TK for part in parts if part.ids_TK is not None]
    return TeacherTargets(
        first.kind,
        torch.cat(ids) if ids else None,
        torch.cat([part.logprobs_TK for part in parts]),
        torch.cat([part.tail_T for part in parts]),
        torch.cat([part.realised_T for part in parts]),
        torch.cat([part.entropy_T for part in parts]),
    )


def fitted(targets: TeacherTargets, labels_T: Tensor) -> tuple[TeacherTargets, int]:
    """Targets of exactly these tokens, whatever came from the disk; and how many did not fit.

    Silent are tokens beyond the targets' end, those whose first outcome is another token or whose
    outcomes name a token twice, and those with numbers that are no log-probs. Targets beyond the
    last token are left out and counted too.
    """
    num_beyond, num_short = len(targets) - len(labels_T), max(len(labels_T) - len(targets), 0)
    ids_TK, *numbers = targets.slice(slice(0, len(labels_T))).tensors
    numbers = [
        torch.cat([each, each.new_full((num_short, *each.shape[1:]), torch.nan)])
        for each in numbers
    ]
    logprobs_TK, tail_T, realised_T, entropy_T = numbers
    said_TO = torch.cat([logprobs_TK, tail_T[:, None], realised_T[:, None]], dim=1)
    is_wrong_T = ~(said_TO <= _MOST).all(1)
    is_wrong_T |= ~torch.isfinite(entropy_T)
    if ids_TK is not None:
        ids_TK = torch.cat([ids_TK, ids_TK.new_full((num_short, ids_TK.shape[1]), NO_TOKEN)])
        is_wrong_T |= (ids_TK[:, 0] != labels_T) | _repeats(ids_TK)
        ids_TK = ids_TK.masked_fill(is_wrong_T[:, None], NO_TOKEN)
        ids_TK[:, 0] = labels_T
    silent = TeacherTargets(
        targets.kind,
        ids_TK,
        logprobs_TK.masked_fill(is_wrong_T[:, None], -torch.inf),
        tail_T.masked_fill(is_wrong_T, -torch.inf),
        realised_T.masked_fill(is_wrong_T, -torch.inf),
        entropy_T.masked_fill(is_wrong_T, 0.0),
    )
    return silent, int(is_wrong_T.sum()) + max(num_beyond, 0)


def _repeats(ids_TK: Tensor) -> Tensor:
    """Where a token stands twice among the outcomes, so that its mass would count twice, [T]."""
    sorted_TK = ids_TK.sort(dim=1).values
    is_again_TK = (sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] != NO_TOKEN)
    return is_again_TK.any(1)


def _counted(draws_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Each drawn id once with how often it came; NO_TOKEN and 0 in the places that are left over.

    Example:
        [5, 3, 5] → ids [3, 5, -1], counts [1, 2, 0]
    """
    sorted_TD = draws_TD.sort(dim=1).values
    is_new_TD = torch.ones_like(sorted_TD, dtype=torch.bool)
    is_new_TD[:, 1:] = sorted_TD[:, 1:] != sorted_TD[:, :-1]
    place_TD = is_new_TD.cumsum(1) - 1
    counts_TD = torch.zeros_like(draws_TD).scatter_add_(1, place_TD, torch.ones_like(draws_TD))
    ids_TD = torch.full_like(draws_TD, NO_TOKEN).scatter_(1, place_TD, sorted_TD)
    return ids_TD, counts_TD
