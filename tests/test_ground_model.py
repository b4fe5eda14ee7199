"""Model folders: exact round trips, every damage named, nothing executed; Llama 4's shims."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama, make_tiny_model, make_tiny_with_images
from safetensors.torch import load_file, save_file

from ground.errors import DataError
from ground.llama4 import apply_shims
from ground.logprobs import model_logprobs
from ground.model import (
    export_model,
    freeze_unreached,
    load_model,
    load_tokenizer,
    model_card,
    tensors_of,
)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """An own copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


def write_index(folder: Path, shard: str) -> None:
    weights = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_export_and_load_give_the_same_bits(tiny_model: Path, tmp_path: Path):
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    exported = tmp_path / "exported"
    exported.mkdir()
    export_model(model, tokenizer, exported, {"stage": "sft", "run": "tiny"})
    again = load_model(exported)
    ours, theirs = tensors_of(model), tensors_of(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert load_tokenizer(exported).chat_template == tokenizer.chat_template
    assert not [file for file in exported.iterdir() if file.suffix in {".bin", ".pt", ".pkl"}]
    assert "stage | sft" in (exported / "README.md").read_text()


def test_the_card_holds_provenance_but_no_secret(tiny_model: Path):
    card = model_card(
        load_model(tiny_model),
        {
            "stage": "rl",
            "base": "a|b",
            "note": "hf_abcdefghijklmnopqrstuv",
            "pass@1": {"mean": 0.5},
        },
    )
    assert "# packtrain · rl" in card and "a\\|b" in card and '{"mean": 0.5}' in card
    assert "hf_abc" not in card and "base model's licence" in card


def test_tensors_are_copies_and_tied_weights_come_once(tmp_path: Path):
    model = load_model(make_tiny_model(tmp_path / "tied", tie_word_embeddings=True))
    tensors = tensors_of(model)
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    other = load_model(tmp_path / "tied")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert torch.equal(
        tensors["model.embed_tokens.weight"], tensors_of(other)["model.embed_tokens.weight"]
    )
    other.load_state_dict(tensors_of(model), strict=False)
    tokens = torch.arange(9)[None]
    assert torch.equal(model(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lightglue"}, "model_type must be one of"),
        ({"model_type": None}, "model_type must be one of"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"vocab_size": 265}, "mismatched keys|do not fit"),
        ({"use_qk_norm": False, "attention_bias": True}, "missing keys"),
        ({"num_hidden_layers": 5}, "config.json cannot be used|missing keys"),
        ({"tie_word_embeddings": False, "num_local_experts": 5}, "mismatched keys|do not fit"),
        ({"hidden_size": "big"}, "config.json cannot be used"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(folder: Path, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(DataError, match=message) as caught:
        load_model(folder)
    assert str(folder) in caught.value.where


def test_remote_code_is_never_run(folder: Path, tmp_path: Path):
    sentinel = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass M: pass\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.M", "AutoConfig": "evil.M"})
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.M", "evil.M"]}}))
    load_model(folder)
    load_tokenizer(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights_are_named(folder: Path, size: int):
    file = folder / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(DataError, match="damaged") as caught:
        load_model(folder)
    assert caught.value.where == str(file)


def test_weights_that_are_not_finite_are_named(folder: Path):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.norm\.weight holds NaN"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "weights.pkl"])
def test_pickles_are_refused_by_name_and_never_opened(folder: Path, tmp_path: Path, name: str):
    sentinel = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(sentinel), "w")

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=name) as caught:
        load_model(folder)
    assert "convert" in caught.value.fix and not sentinel.exists()


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "x.bin", "..", "", 7],
)
def test_an_index_cannot_lead_out_of_the_folder(folder: Path, shard):
    shutil.copy(folder / "model.safetensors", folder.parent / "model.safetensors")
    write_index(folder, shard)
    with pytest.raises(DataError, match="a shard must be named"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "absent"])
def test_a_shard_must_be_a_regular_file_of_the_folder(folder: Path, kind: str):
    shard = folder / "shard.safetensors"
    write_index(folder, shard.name)
    if kind == "symlink":
        outside = folder.parent / "outside.safetensors"
        shutil.copy(folder / "model.safetensors", outside)
        shard.symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    with pytest.raises(DataError, match="missing" if kind == "absent" else "regular files"):
        load_model(folder)


def test_shards_inside_the_folder_load(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    shutil.copy(folder / "model-1.safetensors", folder / "model.safetensors")
    write_index(folder, "model-1.safetensors")
    (folder / "model.safetensors").unlink()
    assert len(tensors_of(load_model(folder))) == 45


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors is missing"),
    ],
)
def test_missing_files_are_named(folder: Path, file: str, message: str):
    (folder / file).unlink()
    with pytest.raises(DataError, match=message):
        load_model(folder)


def test_a_folder_that_is_not_there_and_an_adapter(folder: Path):
    with pytest.raises(DataError, match="does not exist"):
        load_model(folder / "nowhere")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(DataError, match="merge the adapter"):
        load_model(folder)


def test_a_missing_or_broken_tokenizer_is_named(folder: Path):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_tokenizer(folder)
    assert caught.value.where.endswith("tokenizer.json")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        load_tokenizer(folder)


UNSHIMMED = """
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig
assert not hasattr(Llama4ForCausalLM, Llama4ForCausalLM.base_model_prefix)
assert Llama4ForCausalLM.base_model_prefix == "language_model", "prefix mended"
assert not hasattr(Llama4TextConfig(num_hidden_layers=1), "num_experts"), "num_experts mended"
from transformers import PreTrainedModel
assert Llama4ForConditionalGeneration.base_model is PreTrainedModel.base_model, "base_model mended"
"""


def test_the_shims_are_still_needed():
    """Fails when transformers mends one: then drop it from ground/llama4.py together with this."""
    import subprocess
    import sys

    result = subprocess.run(
        [sys.executable, "-c", UNSHIMMED], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_the_shims_give_trl_what_it_asks_for(tiny_model: Path):
    apply_shims()
    apply_shims()
    model = load_model(tiny_model)
    assert type(model.base_model).__name__ == "Llama4TextModel"
    assert model.config.num_experts == 4
    saved = json.loads((tiny_model / "config.json").read_text())
    assert saved["num_local_experts"] == 4 and "num_experts" not in saved


def test_an_image_and_text_model_keeps_both_and_has_a_text_backbone(tmp_path: Path):
    model = load_model(make_tiny_with_images(tmp_path / "both"))
    assert any("vision_model" in name for name in tensors_of(model))
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        logprobs, _ = model_logprobs(model, tokens, torch.ones(1, 10))
        expected = torch.log_softmax(model(input_ids=tokens).logits[0], -1)
    assert float(logprobs[0, 4]) == pytest.approx(float(expected[3, 4]), abs=1e-5)


def test_what_text_does_not_reach_is_frozen_and_all_else_has_a_gradient(tmp_path: Path) -> None:
    model = load_model(make_tiny_with_images(tmp_path / "both"))
    assert freeze_unreached(model) == {"frozen": "multi_modal_projector, vision_model"}
    model_logprobs(model, torch.arange(10)[None], torch.ones(1, 10))[0].sum().backward()
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {name for name, each in model.named_parameters() if each.grad is not None}
    assert len(trained) == 45 and "language_model.lm_head.weight" in trained
    tied = load_model(make_tiny_llama(tmp_path / "tied"))
    assert freeze_unreached(tied) == {} and all(each.requires_grad for each in tied.parameters())
