"""The policy losses, what may be combined with them, and what is always measured beside them.

Pure functions of tensors, one formula each. N trained tokens (policy tokens of unfiltered groups),
flat over rows. mu: the sampler's recorded probability of a token; pi: the learner's current one at
the same temperature; rho = pi / mu; sg: stop-gradient; A: the advantage of each token's rollout.

A loss is per token: the caller sums it over the global batch and divides once by the global number
of trained tokens, those that a mask drops included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def aipo(logprobs_N: Tensor, behavior_N: Tensor, advantages_N: Tensor, rho_max: float) -> Tensor:
    """-sg(min(rho, rho_max)) * A * log pi (LlamaRL, arXiv 2505.24034).

    The importance weight is truncated and carries no gradient, so that a token beyond rho_max
    still learns (PPO's clip would silence it); at mu = pi the gradient is REINFORCE's.

    Args:
        logprobs_N: log pi, differentiable.
        behavior_N: log mu, as recorded while sampling.
        rho_max: truncation of rho, at least 1; LlamaRL uses 2 to 10.
    """
    return cispo(logprobs_N, behavior_N, advantages_N, 0.0, rho_max)


def cispo(
    logprobs_N: Tensor, behavior_N: Tensor, advantages_N: Tensor, rho_min: float, rho_max: float
) -> Tensor:
    """-sg(clip(rho, rho_min, rho_max)) * A * log pi (MiniMax-M1, arXiv 2506.13585)."""
    rho_N = (logprobs_N.detach() - behavior_N).exp()
    return -rho_N.clamp(rho_min, rho_max) * advantages_N * logprobs_N


def clip(
    logprobs_N: Tensor, behavior_N: Tensor, advantages_N: Tensor, low: float, high: float
) -> Tensor:
    """-min(rho * A, clip(rho, 1 - low, 1 + high) * A) (DAPO, arXiv 2503.14476)."""
    rho_N = (logprobs_N - behavior_N).exp()
    return -torch.minimum(rho_N * advantages_N, rho_N.clamp(1 - low, 1 + high) * advantages_N)


def decoupled(
    logprobs_N: Tensor,
    proximal_N: Tensor,
    behavior_N: Tensor,
    advantages_N: Tensor,
    low: float,
    high: float,
    weight_max: float,
) -> Tensor:
    """-min(pi_prox / mu, weight_max) * min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_prox.

    The trust region lies around the proximal policy, the correction goes from the sampler to it
    (AReaL, arXiv 2505.24298).

    Args:
        proximal_N: log pi_prox, without gradient.
    """
    weight_N = (proximal_N - behavior_N).exp().clamp(max=weight_max)
    return weight_N * clip(logprobs_N, proximal_N, advantages_N, low, high)


def interpolated(logprobs_N: Tensor, behavior_N: Tensor, ages_N: Tensor) -> Tensor:
    """log pi_prox between sampler and learner, without a forward pass (A-3PO, arXiv 2512.06547).

    log-linear in the versions: a token sampled d versions ago lies d + 1 steps behind the policy
    that this step makes, and the proximal policy d steps ahead of it, so the learner's share is
    d / (d + 1). A token of the current version has pi_prox = mu.

    Args:
        ages_N: versions between sampling and the step's start.
    """
    share_N = ages_N / (ages_N + 1)
    return (behavior_N + share_N * (logprobs_N - behavior_N)).detach()


def icepop_mask(logprobs_N: Tensor, behavior_N: Tensor, low: float, high: float) -> Tensor:
    """True where low <= rho <= high: sampler and learner agree (IcePop in Ring-1T, 2510.18855).

    Beyond that the difference is numerical noise of two engines rather than learning.
    """
    rho_N = (logprobs_N.detach() - behavior_N).exp()
    return (rho_N >= low) & (rho_N <= high)


def sequence_mask(
    logprobs_N: Tensor, behavior_N: Tensor, advantages_N: Tensor, rows_N: Tensor, limit: float
) -> Tensor:
    """False on rows with A < 0 and a mean log(mu / pi) above `limit` (DeepSeek-V3.2, 2512.02556).

    Pushing down an answer that the learner would hardly give any more teaches nothing but damage.

    Args:
        rows_N: [N] number of each token's row; all trained tokens of a row must be here.
    """
    drift_N = behavior_N - logprobs_N.detach()
    counts_R = torch.bincount(rows_N)
    sums_R = drift_N.new_zeros(len(counts_R)).index_add(0, rows_N, drift_N)
    return ~((sums_R / counts_R)[rows_N].gt(limit) & (advantages_N < 0))


def reference_kl(logprobs_N: Tensor, behavior_N: Tensor, reference_N: Tensor) -> Tensor:
    """rho * (q / pi - 1 - log(q / pi)): K3 of KL(pi || q), made unbiased for tokens drawn from mu.

    The importance weight carries its gradient (DeepSeek-V3.2, arXiv 2512.02556): so the mean over
    mu is the KL and the mean gradient is the KL's; K3 alone has the gradient of another function.

    Args:
        reference_N: log q of the frozen reference, without gradient.
    """
    log_ratio_N = reference_N - logprobs_N
    return (logprobs_N - behavior_N).exp() * (log_ratio_N.exp() - 1 - log_ratio_N)


def effective_share(weights_N: Tensor) -> float:
    """(sum w)^2 / (N sum w^2): the share of N equal tokens that weighs as much as these.

    Example:
        w = [1, 1, 1, 1] → 1;  w = [4, 0, 0, 0] → 0.25;  w = [0.5, 1.5] → 4 / (2 * 2.5) = 0.8
    """
    weights_N = weights_N.double()
    total = weights_N.square().sum().item()
    return weights_N.sum().square().item() / (len(weights_N) * total) if total else 0.0


def mismatch(logprobs_N: Tensor, behavior_N: Tensor) -> dict[str, float]:
    """How far the learner has moved from the policy that sampled the step's tokens.

    `mismatch_kl` is KL(mu || pi), sampler to learner, by Schulman's K3: rho - 1 - log rho, never
    negative. The tokens were drawn from mu, under which that is unbiased for this direction (the
    other one would be rho log rho - rho + 1); verl's `rollout_corr/k3_kl` is the same number.
    `ess` is the effective share of the unbounded rho: 1 on policy, 1/N at worst.
    """
    log_rho_N = (logprobs_N - behavior_N).detach().double()
    rho_N = log_rho_N.exp()
    quantiles = _quantiles(rho_N, (0.05, 0.5, 0.95))
    return {
        "rho_mean": rho_N.mean().item(),
        "rho_p05": quantiles[0],
        "rho_p50": quantiles[1],
        "rho_p95": quantiles[2],
        "rho_max": rho_N.max().item(),
        "ess": effective_share(rho_N),
        "mismatch_kl": (rho_N - 1 - log_rho_N).mean().item(),
    }


def oldest_of_rows(ages_N: Tensor, rows_N: Tensor) -> Tensor:
    """[N] age of the oldest token in each token's row.

    Args:
        rows_N: number of each token's row, from 0.
    """
    oldest_R = ages_N.new_zeros(int(rows_N.max()) + 1 if len(rows_N) else 0)
    return oldest_R.scatter_reduce(0, rows_N.long(), ages_N, "amax")[rows_N.long()]


def fresh_gap(logprobs_N: Tensor, behavior_N: Tensor, oldest_N: Tensor) -> dict[str, float]:
    """Nats between engine and learner on answers that this very version has sampled from the start.

    They should be roundings: nothing was learned in between. So it shows what the parity gate's
    probes cannot, whether an engine computes as the learner does while it decodes. (A token that
    follows older ones differs by right: the engine has read those under older weights.) Empty
    where no answer is fresh.

    Args:
        oldest_N: see `oldest_of_rows`.
    """
    off_N = (logprobs_N - behavior_N).detach().abs()[oldest_N == 0]
    if not len(off_N):
        return {}
    return {"fresh_gap_mean": off_N.mean().item(), "fresh_gap_max": off_N.max().item()}


def _quantiles(values_N: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Linear quantiles by sorting: torch.quantile refuses more than 2^24 values."""
    ordered_N = values_N.sort().values
    found = []
    for level in levels:
        place = level * (len(ordered_N) - 1)
        below, share = int(place), place - int(place)
        pair = ordered_N[below : below + 2].tolist()
        found.append(pair[0] + share * (pair[-1] - pair[0]))
    return found
