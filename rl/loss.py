"""The policy loss and what is always measured beside it. Pure functions of tensors.

N trained tokens (policy tokens of unfiltered groups), flat over rows. mu: the sampler's recorded
probability of a token; pi: the learner's current one at the same temperature; rho = pi / mu.
"""

from __future__ import annotations

from torch import Tensor


def aipo(logprobs_N: Tensor, behavior_N: Tensor, advantages_N: Tensor, rho_max: float) -> Tensor:
    """Loss of each token: -sg(min(rho, rho_max)) * A * log pi (LlamaRL, arXiv 2505.24034).

    The importance weight is truncated and carries no gradient, so that a token beyond rho_max
    still learns (PPO's clip would silence it); at mu = pi the gradient is REINFORCE's.
    The caller sums over the global batch and divides once by the global number of trained tokens.

    Args:
        logprobs_N: log pi, differentiable.
        behavior_N: log mu, as recorded while sampling.
        advantages_N: the advantage of each token's rollout.
        rho_max: truncation of rho, at least 1; LlamaRL uses 2 to 10.
    """
    rho_N = (logprobs_N.detach() - behavior_N).exp()
    return -rho_N.clamp(max=rho_max) * advantages_N * logprobs_N


def mismatch(logprobs_N: Tensor, behavior_N: Tensor, rho_max: float) -> dict[str, float]:
    """How far the learner has moved from the policy that sampled the step's tokens.

    `kl` is Schulman's K3, rho - 1 - log rho, unbiased under mu and never negative;
    `ess` is the effective sample share (sum rho)^2 / (N sum rho^2): 1 on policy, 1/N at worst.

    Example:
        rho = [0.5, 1.5] → mean 1.0, ess = 4 / (2 * 2.5) = 0.8
    """
    log_rho_N = (logprobs_N - behavior_N).detach().double()
    rho_N = log_rho_N.exp()
    quantiles = rho_N.quantile(rho_N.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {
        "rho_mean": rho_N.mean().item(),
        "rho_p05": quantiles[0],
        "rho_p50": quantiles[1],
        "rho_p95": quantiles[2],
        "rho_max": rho_N.max().item(),
        "clip_share": (rho_N > rho_max).double().mean().item(),
        "ess": (rho_N.sum().square() / (len(rho_N) * rho_N.square().sum())).item(),
        "mismatch_kl": (rho_N - 1 - log_rho_N).mean().item(),
    }
