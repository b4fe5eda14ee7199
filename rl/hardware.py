"""What devices can do, by their makers' data sheets, and how much of it we count on.

Peaks are dense BF16 without sparsity. Nothing here was measured by us; efficiencies are what others
report of runs of that kind, or assumed where nobody does, and each says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or one processor core.

    Example:
        DEVICES["h100"].flops → 989e12
    """

    name: str
    flops: float
    """Peak floating-point operations a second, dense BF16 (cpu: FP32)."""
    bandwidth: float
    """Bytes a second between it and its memory."""
    memory: float
    """Bytes."""
    network: float
    """Bytes a second between it and devices of other machines."""
    per_machine: int
    memory_of_machine: float
    """Bytes that the machine's processors have."""
    number_bytes: int = 2
    """Of a weight or a cached number in an engine on it."""


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989e12, 3.35e12, 80e9, 50e9, 8, 2e12),
        Device("h200", 989e12, 4.8e12, 141e9, 50e9, 8, 2e12),
        Device("a100", 312e12, 2.039e12, 80e9, 25e9, 8, 2e12),
        Device("cpu", 50e9, 8e9, 4e9, 1e9, 64, 256e9, number_bytes=4),
    )
}
"""h100, h200: NVIDIA H100 and H200 SXM data sheets; network: ConnectX-7 of 400 Gb/s per GPU, as in
DGX H100. a100: NVIDIA A100 80 GB SXM data sheet; 200 Gb/s per GPU, as in DGX A100. Memory of their
machines: 2 TB, as in DGX H100, DGX H200 and DGX A100 640 GB. cpu: one core of a server, assumed:
two 256-bit FMA units at 1.6 GHz, its share of the memory, 4 GB."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The shares of the peaks that are counted on.

    Example:
        Efficiency(train=0.4)    # Llama 3's
    """

    train: float = 0.40
    """Of peak FLOP/s, forward and backward, recomputation not counted (MFU). Llama 3 reports 38 to
    43 % in BF16 on H100 (arXiv 2407.21783, table 4); Meta's 390 TFLOP/s a GPU for Llama 4 Behemoth
    in FP8 are 39 % of the BF16 peak."""
    prefill: float = 0.40
    """Of peak FLOP/s while prompts are read: assumed, as training."""
    decode: float = 0.60
    """Of the bandwidth while tokens are sampled: assumed."""
    layer_seconds: float = 20e-6
    """Of a layer in a decoding step besides arithmetic and memory, two all-reduces included where
    it is spread over devices: assumed."""
    network: float = 0.5
    """Of the network's bandwidth in a hand-over: assumed."""
    memory: float = 0.90
    """Of a device's memory that models may fill: vLLM's default gpu_memory_utilization."""
