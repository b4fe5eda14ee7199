"""What several rooms' tests need: a tiny Llama-4-shaped model, tokenizer and chat template."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from ground.faults import VARIABLE, Faults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C in its background jobs, and our children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run, and as long as each of them takes on a busy machine.
settings.register_profile("packtrain", deadline=None, derandomize=True)
settings.load_profile("packtrain")

TINY_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|pad|>",
)
TINY_CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|header_start|>' + message['role'] + '<|header_end|>\n\n' }}"
    "{{- message['content'] + '<|eot|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|header_start|>assistant<|header_end|>\n\n' }}"
    "{%- endif %}"
)


def make_tiny_model(directory: Path, *, seed: int = 0, **overrides: object) -> Path:
    """Write a randomly initialised Llama 4 text model to `directory` and return it.

    Four layers: dense, MoE (4 experts), dense, MoE without RoPE; 73 thousand parameters; a
    byte-level tokenizer (ids below 256 are bytes, in ByteLevel's order; from 256 on come
    TINY_SPECIAL_TOKENS) whose post-processor adds BOS, as Meta's does.

    Args:
        overrides: keys of Llama4TextConfig, e.g. attention_chunk_size=8.
    """
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    tokenizer = make_tiny_tokenizer()
    settings: dict[str, object] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 128,
        "max_position_embeddings": 1024,
        "bos_token_id": 256,
        "eos_token_id": [257, 260],
        "pad_token_id": 261,
        "initializer_range": 0.1,
    }
    config = Llama4TextConfig(**{**settings, **overrides})  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama4ForCausalLM(config)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tiny_with_images(directory: Path) -> Path:
    """Write the tiny Llama 4 with an encoder of images before it, and return its folder.

    45 parameters of the language model; 26 of the encoder and its projector come first.
    """
    import torch
    from transformers import AutoConfig, Llama4Config, Llama4ForConditionalGeneration

    text = AutoConfig.from_pretrained(make_tiny_model(directory)).to_dict()
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 32,
        "image_size": 28,
        "patch_size": 14,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))
    model.save_pretrained(directory)
    return directory


def make_tiny_llama(directory: Path, *, seed: int = 0) -> Path:
    """Write a randomly initialised dense Llama with tied embeddings, and return its folder.

    Two layers, 27 thousand parameters, heads of 32 as vLLM's CPU kernels ask; tokenizer as above.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=260,
        pad_token_id=261,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def make_tiny_tokenizer(
    chat_template: str | None = TINY_CHAT_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 262 tokens: one per byte, then the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in TINY_SPECIAL_TOKENS]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 256)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama 4 model; shared by the session, so copy it before changing it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray cluster of this session's own, with four processors however many there are.

    Its workers inherit a path to this folder, so that actors may be defined in test modules.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv(VARIABLE, f"@{tmp_path_factory.mktemp('faults') / 'plan.json'}")
        _start_ray()
        yield
        ray.shutdown()


@pytest.fixture
def armed(ray_local: None, tmp_path: Path) -> Iterator[Callable[[Faults], Faults]]:
    """Arms a plan of faults in the workers that are born under `ray_local` from now on."""
    path = Path(os.environ[VARIABLE][1:])

    def arm(plan: Faults) -> Faults:
        path.write_text(plan.environment()[VARIABLE])
        return plan

    yield arm
    path.unlink(missing_ok=True)


def _start_ray() -> None:
    import ray

    from rollout.cluster import system_config
    from rollout.lean_ray import lean_ray

    for tries_left in reversed(range(3)):
        try:
            with lean_ray():
                ray.init(
                    address="local",
                    num_cpus=4,
                    include_dashboard=False,
                    log_to_driver=False,
                    object_store_memory=256 << 20,
                    namespace="tests",
                    _system_config=system_config(),
                )
            return
        except Exception:  # a raylet that is slow to start is a bare Exception
            ray.shutdown()
            if not tries_left:
                raise


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """A folder in memory where the machine has one: fsync costs nothing there."""
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if os.access(ram, os.W_OK) else None) as folder:
        yield Path(folder)
