"""Published comparisons of asynchronous with synchronous RL, each input with its source.

Sources: AReaL is arXiv 2505.24298v5, LlamaRL arXiv 2505.24034v2. What stands in AReaL's charts
(figures 5c, 6a, 6b) is as read off them by others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ground.shape import ModelShape
from rl.config import RlSection
from rl.hardware import DEVICES, Device, Efficiency
from rl.rehearse import Cast
from rl.roofline import Workload, decoding_step

_H100 = DEVICES["h100"]


@dataclass(frozen=True, slots=True)
class Case:
    """A published comparison.

    Example:
        Case("AReaL 1.5B", QWEN["1.5B"], devices=128, learner_devices=32, …, published=2.77)
    """

    name: str
    shape: ModelShape
    devices: int
    learner_devices: int
    """Side by side; in turns it has all of them."""
    prompts: int
    answers: int
    """Of a prompt."""
    prompt_tokens: float
    new_tokens: float
    most_tokens: int
    staleness: int
    published: float
    sync_seconds: float
    """Published, of a step in turns."""
    inputs: Mapping[str, str]
    """Input → where it is from, or that it is assumed."""
    why: str
    """What the inputs do not explain."""
    width: int = 1
    """Devices of an engine side by side."""
    sync_width: int = 1
    """Devices of an engine in turns."""
    rows: int = 256
    """Places of an engine at most."""
    skew: float = 0.7
    decode_tokens: float | None = None
    """Published tokens a second of one device in generation; sets the efficiency of decoding."""
    decode_share: float = 0.60
    """Of the bandwidth in generation, where no rate is published."""
    train_share: float = 0.40
    """Of the peak in training."""
    has_proximal: bool = False
    is_fp8: bool = False
    """Whether engines side by side hold FP8."""
    layer_seconds: float = 20e-6
    sync_switch_seconds: float = 0.0
    """Lost with each step in turns: resharding and reloading."""
    load_seconds: float = 2.0

    @property
    def load(self) -> Workload:
        """Every group counts: neither paper filters in these comparisons."""
        return Workload(self.prompt_tokens, self.new_tokens, flat_share=0.0, refills=0)

    def device(self, *, is_sync: bool) -> Device:
        """The device with the engine's number format."""
        return replace(_H100, number_bytes=1) if self.is_fp8 and not is_sync else _H100

    def counted(self) -> Efficiency:
        """Efficiencies, that of decoding from the published rate where there is one."""
        base = Efficiency(
            train=self.train_share, decode=self.decode_share, layer_seconds=self.layer_seconds
        )
        if self.decode_tokens is None:
            return base
        context = self.prompt_tokens + self.new_tokens / 2
        free = replace(base, layer_seconds=0.0)
        step = decoding_step(self.shape, _H100, self.rows, context, 1, free)
        wanted = self.rows / self.decode_tokens - self.shape.layers * self.layer_seconds
        return replace(base, decode=base.decode * step / wanted)

    def section(self, *, is_sync: bool) -> RlSection:
        """The recipe that comes nearest."""
        engines = self.engines(is_sync=is_sync)
        samples = self.prompts * self.answers
        rows = min(self.rows, math.ceil(samples / engines)) if is_sync else self.rows
        return RlSection.model_validate(
            {
                "steps": 1,
                "groups_per_step": self.prompts,
                "group_size": self.answers,
                "max_staleness": 0 if is_sync else self.staleness,
                "max_refills": 0,
                "sampling": {"max_new_tokens": self.most_tokens},
                "engine": {
                    "num_slots": rows,
                    "max_length": self.most_tokens + round(self.prompt_tokens) + 1,
                },
                "loss": {"kind": "decoupled" if self.has_proximal else "aipo"},
            }
        )

    def engines(self, *, is_sync: bool) -> int:
        """Engines on the devices that there are for them."""
        if is_sync:
            return self.devices // self.sync_width
        return (self.devices - self.learner_devices) // self.width

    def cast(self, *, is_sync: bool) -> Cast:
        """Who plays."""
        return Cast(
            self.shape,
            self.device(is_sync=is_sync),
            self.section(is_sync=is_sync),
            self.load,
            learner_devices=self.devices if is_sync else self.learner_devices,
            engines=self.engines(is_sync=is_sync),
            width=self.sync_width if is_sync else self.width,
            skew=self.skew,
            load_seconds=0.0 if is_sync else self.load_seconds,
            reward_seconds=0.0,
            switch_seconds=self.sync_switch_seconds if is_sync else 0.0,
            counted=self.counted(),
        )


def _qwen(layers: int, hidden: int, heads: int, kv_heads: int, width: int) -> ModelShape:
    """Qwen2.5, on which the DeepSeek-R1 distillations stand: public config.json."""
    return ModelShape(layers, hidden, heads, kv_heads, 128, 152_064, width)


def _llama(layers: int, hidden: int, heads: int, width: int) -> ModelShape:
    """Llama 3.1: public config.json."""
    return ModelShape(layers, hidden, heads, 8, 128, 128_256, width)


_AREAL_INPUTS = {
    "devices": "table 1: nodes of 8 H800; compute and HBM bandwidth as H100's",
    "learner_devices": "section 7.1: a quarter of the devices",
    "prompts, answers": "table 3: 512 prompts, 16 answers",
    "most_tokens": "table 3: 27,648",
    "new_tokens": "1.5B: tokens a second (figure 5c) x hours / steps (table 1) = 76.0M a step in "
    "turns and side by side alike, 9,280 a sample; others: assumed the same",
    "staleness": "section 7.1: 8 in math, 4 in code",
    "train_share": "figure 6a: 427, 455, 388 TFLOP/s a GPU of 989, taken as model FLOPs (14B: "
    "assumed as 32B)",
    "decode_tokens": "figure 6b: 231k and 130k tokens/s on 4 nodes, which are 0.32 and 0.40 of the "
    "bandwidth; 14B, 32B: assumed 0.36, their mean",
    "has_proximal": "section 5.2: log-probs are recomputed at each step",
    "rows": "assumed: 256, as the KV cache allows",
    "skew": "assumed: 0.7; a mean of 9,000 under a limit of 27,648 leaves no room for much more",
    "layer_seconds": "assumed: 20 µs",
    "sync_switch_seconds": "assumed: 0, the paper gives none",
    "load_seconds": "assumed: 2 s",
}
_AREAL_WHY = (
    "The published steps, in turns more than side by side, take longer than the published rates of "
    "generation (figure 6b) and training (figure 6a) explain. What a decoding step with few rows "
    "costs, for which a batch's longest answers wait, is not published, nor what resharding costs "
    "in turns. The table shows that these decide the ratio."
)
_AREAL = Case(
    "AReaL 1.5B",
    _qwen(28, 1536, 12, 2, 8960),
    devices=128,
    learner_devices=32,
    prompts=512,
    answers=16,
    prompt_tokens=200,
    new_tokens=9080,
    most_tokens=27_648,
    staleness=8,
    published=41.0 / 14.8,
    sync_seconds=41.0 * 3600 / 250,
    inputs=_AREAL_INPUTS,
    why=_AREAL_WHY,
    decode_tokens=231_000 / 32,
    train_share=427 / 989,
    has_proximal=True,
)
_LLAMARL_INPUTS = {
    "published": "section on efficiency: 2.52x, 3.98x, 10.7x; 405B from 635.8 to 59.5 s",
    "sync_seconds": "405B: as above; 8B and 70B: not at hand, the ratio alone is compared",
    "load_seconds": "section on DDMA: 1.15 s for 70B, about 2 s for the largest",
    "devices": "assumed: 256, 256, 1,024 H100",
    "learner_devices": "assumed: half",
    "prompts, answers": "assumed: 2,048 answers a step, 512 x 4",
    "new_tokens, most_tokens": "assumed: 500 of 2,048, as answers to MATH are",
    "width, sync_width": "assumed: 1, 4, 8 side by side; 8, 8, 16 in turns, where memory is shared",
    "is_fp8": "the paper quantises its generator; for 405B assumed here",
    "staleness": "assumed: 1",
    "skew": "assumed: 0.7",
}
_LLAMARL_WHY = (
    "How the baseline is set up (model parallelism, batch in memory, offloading, reloading) makes "
    "most of the published ratio and is not among the inputs that we have: overlap alone cannot "
    "give more than (c_t + c_g) / max(c_t, c_g), which is at most 2, and the answers of MATH are "
    "too short for long tails."
)
_LLAMARL = Case(
    "LlamaRL 8B",
    _llama(32, 4096, 32, 14_336),
    devices=256,
    learner_devices=128,
    prompts=512,
    answers=4,
    prompt_tokens=100,
    new_tokens=500,
    most_tokens=2048,
    staleness=1,
    published=2.52,
    sync_seconds=math.nan,
    inputs=_LLAMARL_INPUTS,
    why=_LLAMARL_WHY,
    width=1,
    sync_width=8,
    load_seconds=1.0,
)
CASES = (
    _AREAL,
    replace(
        _AREAL,
        name="AReaL 7B",
        shape=_qwen(28, 3584, 28, 4, 18_944),
        devices=192,
        learner_devices=48,
        published=57.7 / 25.4,
        sync_seconds=57.7 * 3600 / 250,
        decode_tokens=130_000 / 32,
        train_share=455 / 989,
    ),
    replace(
        _AREAL,
        name="AReaL 14B",
        shape=_qwen(48, 5120, 40, 8, 13_824),
        devices=256,
        learner_devices=64,
        staleness=4,
        published=48.8 / 21.9,
        sync_seconds=48.8 * 3600 / 80,
        decode_tokens=None,
        decode_share=0.36,
        train_share=388 / 989,
        width=2,
        sync_width=2,
    ),
    replace(
        _AREAL,
        name="AReaL 32B",
        shape=_qwen(64, 5120, 40, 8, 27_648),
        devices=384,
        learner_devices=96,
        staleness=4,
        published=51.1 / 31.1,
        sync_seconds=51.1 * 3600 / 60,
        decode_tokens=None,
        decode_share=0.36,
        train_share=388 / 989,
        width=4,
        sync_width=4,
    ),
    _LLAMARL,
    replace(
        _LLAMARL,
        name="LlamaRL 70B",
        shape=_llama(80, 8192, 64, 28_672),
        published=3.98,
        width=4,
        load_seconds=1.15,
    ),
    replace(
        _LLAMARL,
        name="LlamaRL 405B",
        shape=_llama(126, 16_384, 128, 53_248),
        devices=1024,
        learner_devices=512,
        published=10.7,
        sync_seconds=635.8,
        width=8,
        sync_width=16,
        is_fp8=True,
        load_seconds=2.0,
    ),
)
