"""vLLM's own process (EngineCore): how it is started, and that it never outlives ours.

    started (dies with the thread that started it) → serving → closed, or found dead

It inherits an environment of its own, so that it logs errors only, phones nobody, opens no file
that could be left behind, and uses as many threads as the recipe says.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from transformers import PretrainedConfig
from vllm import ModelRegistry
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.utils import CoreEngineProcManager

from ground.errors import DataError, InfraError, SetupError
from rollout.config import EngineSection
from rollout.leash import leashed
from rollout.network import transport
from rollout.vllm_transfer import transfer_config

logger = logging.getLogger(__name__)

WORKER = "rollout.vllm_worker.WeightTaker"
"""What is mixed into vLLM's worker class."""
_SCHEDULERS = {
    "cpu": "rollout.vllm_scheduler.ScoringScheduler",
    "cuda": "rollout.vllm_scheduler.AsyncScoringScheduler",
}
_CPU_BLOCK = 32
"""Tokens of a block of the KV cache; prompts share whole ones. vLLM would take 128 on a CPU."""
_CPU_STEP_TOKENS = 4096
"""Tokens of one forward pass at most."""
_BYTES = 4
"""Of a number: float32, as the learner computes."""
_GPU_SHARE = 0.9
_CLOSE_SECONDS = 0.2
"""EngineCore holds nothing that would need more time to be put away."""
_GONE_SECONDS = 10.0
"""Until the kernel has put a killed process away; devices may hold one back."""
_POLL_SECONDS = 0.01
_SPARE_CACHE, _LEAST_CACHE = 2, 64 << 20
"""KV cache over what all slots need at most: what is scored needs room too, and layers of several
kinds are filled up to the same size."""


@dataclass(slots=True)
class VllmProcess:
    """A running vLLM.

    Example:
        core = start_vllm(Path("runs/tiny/sft/model"), config, section)
    """

    llm: AsyncLLM
    process: BaseProcess

    def end(self) -> None:
        """Stop it; its process is gone when this returns."""
        self.llm.shutdown(timeout=_CLOSE_SECONDS)
        self.process.join(_GONE_SECONDS)
        if self.process.is_alive():
            logger.warning(
                "%s (pid %s) was killed and is not gone after %g s: the kernel holds it back",
                *(self.process.name, self.process.pid, _GONE_SECONDS),
            )
        del self.llm  # kept until the interpreter ends, it would complain while it is torn down

    def wait(self, seconds: float) -> None:
        """Until it is known how its process ended.

        vLLM's monitor looks as well, and only one of us may take the status: where it was the
        other one, `join` is back before the status is written down.
        """
        deadline = time.monotonic() + seconds
        self.process.join(seconds)
        while self.process.exitcode is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    @property
    def obituary(self) -> InfraError:
        """How its process ended."""
        process = self.process
        return InfraError(
            f"vLLM's process must live, {process.name} (pid {process.pid}) {_fate(process)}",
            where="vllm engine",
            fix="the fleet starts a new worker; where there is none, look above for what vLLM "
            "logged and start again",
        )


def _fate(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None:
        return "has failed"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def start_vllm(
    model_path: Path,
    config: PretrainedConfig,
    section: EngineSection,
    *,
    is_blank: bool = False,
    worker: str = WORKER,
) -> VllmProcess:
    """Start vLLM with a model; call it on the asyncio loop that will use it.

    Args:
        config: the model's own.
        is_blank: random weights do for now, the folder need not have any.
        worker: mixed into vLLM's worker class.

    Raises:
        SetupError: this machine has not the devices that are asked for.
        DataError: vLLM has no kernels for this model.
        InfraError: vLLM did not come up.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_devices(section, device)
    if device == "cpu":
        _check_heads(model_path, config.get_text_config())
    _check_architecture(model_path, config)
    try:
        with _environment(section), leashed():
            arguments = _arguments(model_path, config, section, device, worker)
            arguments.load_format = "dummy" if is_blank else "auto"
            llm = AsyncLLM.from_engine_args(arguments)
    except (RuntimeError, ValueError, OSError) as error:
        raise InfraError(
            f"vLLM must start, got {type(error).__name__}: {error}",
            where=str(model_path),
            fix="look above for what vLLM logged; engine.memory_share and engine.num_slots say how "
            "much memory it takes",
        ) from error
    try:
        return VllmProcess(llm, _process_of(llm))
    except BaseException:
        llm.shutdown(timeout=_CLOSE_SECONDS)
        raise


def _process_of(llm: AsyncLLM) -> BaseProcess:
    """EngineCore's, which vLLM 0.32 keeps to itself."""
    client = llm.engine_core
    assert isinstance(client, MPClient)
    manager = client.resources.engine_manager
    assert isinstance(manager, CoreEngineProcManager)
    (process,) = manager.processes
    return process


def _arguments(
    model_path: Path, config: PretrainedConfig, section: EngineSection, device: str, worker: str
) -> AsyncEngineArgs:
    text = config.get_text_config()
    arguments = AsyncEngineArgs(
        model=str(model_path),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=section.max_length + 1,  # a scored sequence is followed by a token
        max_num_seqs=section.num_slots,
        tensor_parallel_size=section.tensor_parallel,
        distributed_executor_backend="mp" if section.tensor_parallel > 1 else "uni",
        logprobs_mode="processed_logprobs",
        max_logprobs=-1,
        stream_interval=section.max_length + 1,
        generation_config="vllm",
        scheduler_cls=_SCHEDULERS[device],
        worker_extension_cls=worker,
        weight_transfer_config=transfer_config(section.transfer),
        disable_log_stats=True,
        use_tqdm_on_load=False,
        override_generation_config={
            # vLLM has a rule of its own for Llama 4, the learner computes what config.json says.
            "attn_temperature_tuning": bool(text.to_dict().get("attn_temperature_tuning"))
        },
    )
    if device == "cpu":  # nothing is compiled: that costs half a minute a start, and a compiler
        arguments.enforce_eager = True
        arguments.block_size = _CPU_BLOCK
        # A prompt goes in whole: behind a part of one vLLM 0.32 turns seeded generators back, which
        # a CPU's cannot, and dies of it.
        arguments.enable_chunked_prefill = False
        arguments.max_num_batched_tokens = max(_CPU_STEP_TOKENS, section.max_length + 1)
    if device == "cpu" and section.memory_share is None:
        arguments.kv_cache_memory_bytes = _cache_bytes(text, section)
    else:
        arguments.gpu_memory_utilization = section.memory_share or _GPU_SHARE
    return arguments


def _cache_bytes(text: PretrainedConfig, section: EngineSection) -> int:
    """KV cache for as many tokens as slots can hold."""
    settings = text.to_dict()
    heads = settings.get("num_key_value_heads") or settings["num_attention_heads"]
    size = _head_size(settings)
    token = 2 * settings["num_hidden_layers"] * heads * size * _BYTES
    blocks = -(-(section.max_length + 1) // _CPU_BLOCK) * section.num_slots
    return max(_SPARE_CACHE * token * blocks * _CPU_BLOCK, _LEAST_CACHE)


def _head_size(settings: Mapping[str, int]) -> int:
    return settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]


def _check_devices(section: EngineSection, device: str) -> None:
    if section.transfer == "nccl" and device == "cpu":
        raise SetupError(
            "engine.transfer=nccl goes from GPU to GPU, this process has none",
            where="vllm engine",
            fix="set engine.transfer=memory, or run on machines with GPUs",
        )
    have = torch.cuda.device_count() if device == "cuda" else 0
    if section.tensor_parallel > max(have, 1):
        raise SetupError(
            f"engine.tensor_parallel asks for {section.tensor_parallel} GPUs of one machine, this "
            f"process has {have}",
            where="vllm engine",
            why="a layer is cut over GPUs; on a CPU there is nothing to cut it over",
            fix="set engine.tensor_parallel=1, or run on a machine with as many GPUs",
        )


def _check_architecture(model_path: Path, config: PretrainedConfig) -> None:
    """vLLM would run others through transformers, where weights have names that we do not know."""
    names = config.architectures or []
    if not set(names) & ModelRegistry.get_supported_archs():
        raise DataError(
            f"vLLM must know the model's architecture, config.json says {', '.join(names) or None}",
            where=str(model_path),
            fix="set engine.kind=hf for this model",
        )


def _check_heads(model_path: Path, text: PretrainedConfig) -> None:
    """vLLM would find out at the first token, and die of it."""
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if _head_size(text.to_dict()) not in sizes:
        raise DataError(
            f"vLLM's CPU kernels take attention heads of {', '.join(map(str, sizes))}, this model "
            f"has heads of {_head_size(text.to_dict())}",
            where=str(model_path),
            fix="set engine.kind=hf for this model, or run on a machine with GPUs",
        )


@contextmanager
def _environment(section: EngineSection) -> Iterator[None]:
    """What vLLM's processes inherit; ours is as before when this is left."""
    before = dict(os.environ)
    os.environ.update(
        OMP_NUM_THREADS=str(section.threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # workers share processors, the kernel places them
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # of the model, that is: no second process for it
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # the token behind a scored sequence is never computed
        VLLM_RPC_BASE_PATH=f"@packtrain-{os.getpid()}",  # sockets without files (abstract names)
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        # Python takes back what a killed process leaves, and need not say so each time.
        PYTHONWARNINGS="ignore:resource_tracker:UserWarning",
    )
    if not torch.cuda.is_available():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if section.transfer != "memory":
        os.environ.update(transport())
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():  # vLLM adds some of its own
            del os.environ[name]
        os.environ.update(before)
