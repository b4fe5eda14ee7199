"""A low-rank adapter in a live model: the one place that knows peft.

    Adapter(model, section) → trained in place → save (for peft) → merged (a plain model again)

The layers stand inside the model, which stays the PreTrainedModel that it was: what computes with
it needs no other way. Tensors are called `<module>.lora_A.weight` and `<module>.lora_B.weight`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ground.errors import DataError, RecipeError
from ground.lora import LoraSection
from ground.manifest import digest
from ground.merge import A, B, merged_weight
from ground.model import live_tensors
from ground.model_files import check_weight_files
from ground.validation import suggest

_NAME = "default"
_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What peft puts before a tensor's name in its file."""
_OWN_NAME = ".base_layer."
"""What peft puts into the name of a weight that it adds to."""


class Adapter:
    """The only trained part of a model: A and B of each target; all else is frozen.

    Example:
        adapter = Adapter(model, LoraSection(rank=8), seed=0, stage="sft")
        …; adapter.save(folder, base); export_model(adapter.merged(), …)

    Args:
        model: gets the layers; it computes as before until B is no longer zero.
        seed: of A; the same on every rank.

    Raises:
        RecipeError: a target names nothing that can have an adapter.
    """

    def __init__(
        self, model: PreTrainedModel, section: LoraSection, *, seed: int, stage: str
    ) -> None:
        self.scale, self._model = section.scale, model
        self.modules = targets_of(model, section.targets, f"{stage}.lora.targets")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=section.rank,
            lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=section.dropout,
            target_modules=list(self.modules),
            init_lora_weights=True if section.init == "uniform" else "gaussian",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._tuner = LoraModel(model, config, _NAME)
        self._config = config
        self._layers = {name: cast(Linear, model.get_submodule(name)) for name in self.modules}

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(tensor.numel() for tensor in self.live().values())

    def live(self) -> dict[str, Tensor]:
        """A and B themselves, which change as they are trained."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            tensors[name + A], tensors[name + B] = _half(layer.lora_A), _half(layer.lora_B)
        return tensors

    def base(self) -> dict[str, Tensor]:
        """The frozen weights themselves, under the names that they have without an adapter."""
        trained = {f"{name}.lora_{each}.{_NAME}.weight" for name in self.modules for each in "AB"}
        return {
            name.replace(_OWN_NAME, "."): tensor
            for name, tensor in live_tensors(self._model).items()
            if name not in trained
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to saved A and B.

        Raises:
            DataError: they are of other modules, or of another rank.
        """
        own = self.live()
        wrong = sorted(
            name
            for name in own.keys() | tensors.keys()
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape
        )
        if wrong:
            raise DataError(
                f"a saved adapter must have the tensors of this one, {len(wrong)} are missing, "
                f"unknown or of another shape: {', '.join(wrong[:3])}",
                where="adapter",
                fix="undo the change of `lora`, or start the stage again (--from STAGE)",
            )
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone while this lasts; for passes without gradient."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Compute with W + scale · B A in place of two ways side by side, as engines do; for
        passes without gradient.

        The same function but for roundings. A layer has its sum while it computes, and no longer:
        this takes the memory of one layer, not of a second base. The weights come back as they
        were, bit for bit.
        """
        with self.off(), ExitStack() as stack:
            for layer in self._layers.values():
                stack.enter_context(_folding(layer, self.scale))
            yield

    def merged(self) -> PreTrainedModel:
        """The plain model with the adapter added in; the adapter itself can still be saved."""
        return cast(PreTrainedModel, self._tuner.merge_and_unload())

    def save(self, folder: Path, base: Path) -> None:
        """Write A and B with their settings, as `peft.PeftModel.from_pretrained` reads them."""
        self.write(folder)
        self._config.base_model_name_or_path = f"{base.parent.name}/{base.name}"
        self._config.inference_mode = True
        self._config.save_pretrained(str(folder))

    def write(self, folder: Path) -> None:
        """Write A and B alone: what a checkpoint keeps of the model."""
        named = {_PREFIX + name: each.cpu().contiguous() for name, each in self.live().items()}
        save_file(named, folder / _FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Go back to what `write` has written."""
        self.restore({k.removeprefix(_PREFIX): v for k, v in load_file(folder / _FILE).items()})

    def facts(self) -> dict[str, object]:
        """For cards and manifests."""
        whole = sum(tensor.numel() for tensor in self.base().values())
        return {
            "rank": self._config.r,
            "scale": self.scale,
            "modules": len(self.modules),
            "parameters": self.parameters,
            "share_of_base": self.parameters / whole,
        }


def targets_of(model: PreTrainedModel, wanted: list[str] | None, where: str) -> tuple[str, ...]:
    """Full names of the modules that get an adapter.

    Only plain linear maps of the language model can: the log-probs are computed from the LM head's
    weight alone, a router is more than a map, and Llama 4's routed experts are not modules but
    parameters of three dimensions.

    Raises:
        RecipeError: naming all that name none, and the nearest that do; or there is none at all.
    """
    inside = {id(module) for module in cast(nn.Module, model.base_model).modules()}
    able = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) in inside
    ]
    if not able:
        raise RecipeError(
            f"a {type(model).__name__} has no linear map that an adapter could be added to",
            where=where,
            fix="train all weights: take the section `lora` out",
        )
    if wanted is None:
        return tuple(able)
    chosen = {each: [name for name in able if _is_called(name, each)] for each in wanted}
    if problems := [_refusal(model, each, able) for each, found in chosen.items() if not found]:
        raise RecipeError("\n  ".join(problems), where=where)
    return tuple(name for name in able if any(name in found for found in chosen.values()))


def base_identity(section: LoraSection, base: Path) -> dict[str, str]:
    """What a checkpoint that holds an adapter alone must agree with: its settings and its base."""
    hasher = hashlib.sha256()
    for file in check_weight_files(base):
        hasher.update(digest(file).sha256.encode())
    return {"lora": section.model_dump_json(), "base": hasher.hexdigest()}


@contextmanager
def _folding(layer: Linear, scale: float) -> Iterator[None]:
    """The layer's own weight is the sum during each of its passes, also of one that fails."""
    inner = cast(nn.Linear, layer.get_base_layer())
    own, a, b = inner.weight.data, _half(layer.lora_A), _half(layer.lora_B)

    def fold(*_: object) -> None:
        inner.weight.data = merged_weight(own, a, b, scale)

    def unfold(*_: object) -> None:
        inner.weight.data = own

    hooks = (
        inner.register_forward_pre_hook(fold),
        inner.register_forward_hook(unfold, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        unfold()


def _half(halves: nn.ModuleDict) -> Tensor:
    return cast(nn.Linear, halves[_NAME]).weight.detach()


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _refusal(model: PreTrainedModel, wanted: str, able: list[str]) -> str:
    """Why a target gets no adapter."""
    if _is_called("lm_head", wanted):
        return f"'{wanted}' cannot be adapted: log-probs are computed from its weight alone"
    if any(_is_called(name, wanted) and each.ndim > 2 for name, each in model.named_parameters()):
        return f"'{wanted}' cannot be adapted: routed experts are parameters of three dimensions"
    if any(_is_called(name, wanted) for name, _ in model.named_modules()):
        return f"'{wanted}' cannot be adapted: it is not a plain linear map"
    ends = {".".join(name.split(".")[-depth:]) for name in able for depth in (1, 2)}
    return f"the model has no linear map called '{wanted}'{suggest(wanted, sorted(ends))}"
