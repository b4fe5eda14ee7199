"""Recipes: merged, overridden, safe to read, and every error with file, line and nearest key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator

from ground.config import Section
from ground.errors import RecipeError
from ground.positions import MAX_BYTES
from ground.recipe import load_recipe


class Trainer(Section):
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup: int = 0
    kind: Literal["adamw", "sgd"] = "adamw"


class SftSection(Section):
    trainer: Trainer = Trainer()
    epochs: int = 1


class Clip(Section):
    kind: Literal["clip"]
    low: float = 0.2


class Aipo(Section):
    kind: Literal["aipo"]
    cap: float = 2.0


class RlSection(Section):
    group_size: int = Field(default=4, ge=2)
    loss: Annotated[Clip | Aipo, Field(discriminator="kind")] = Aipo(kind="aipo")
    quotas: dict[str, float] = Field(default_factory=dict)
    rounds: list[Trainer] = Field(default_factory=list)
    store: Path | None = None

    @field_validator("quotas")
    @classmethod
    def _sums_to_one(cls, quotas: dict[str, float]) -> dict[str, float]:
        if quotas and abs(sum(quotas.values()) - 1) > 1e-6:
            raise ValueError(f"must sum to 1, got {sum(quotas.values()):g}")
        return quotas


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(text: str, name: str = "recipe.yaml") -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return Path(name)


def rl_errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(text), overrides).stage("rl", RlSection)
    return caught.value.what.splitlines()


# --- what a good recipe gives -----------------------------------------------------------------


def test_mappings_merge_and_lists_replace_along_a_chain_of_extends(folder: Path) -> None:
    recipe("seed: 1\nrl: {group_size: 8, quotas: {a: 0.5, b: 0.5}}\ndpo: {x: 1}", "base/a.yaml")
    recipe("extends: a.yaml\nrl: {rounds: [{warmup: 1}, {warmup: 2}]}", "base/b.yaml")
    top = recipe("extends: base/b.yaml\nname: t\nrl: {rounds: [{warmup: 3}]}\ndpo: null")
    document = load_recipe(top)
    head, section = document.stage("rl", RlSection)
    assert (head.name, head.seed, section.group_size) == ("t", 1, 8)
    assert section.quotas == {"a": 0.5, "b": 0.5}
    assert [item.warmup for item in section.rounds] == [3]
    assert document.has("rl") and not document.has("dpo")


def test_overrides_are_yaml_values_and_win(folder: Path) -> None:
    path = recipe("name: t\nsft: {trainer: {learning_rate: 3}}")
    overrides = ["sft.trainer.learning_rate=1e-5", "seed=7", "rl.loss={kind: clip, low: .1}"]
    document = load_recipe(path, overrides)
    assert document.section("sft", SftSection).trainer.learning_rate == 1e-5
    assert document.section("rl", RlSection).loss == Clip(kind="clip", low=0.1)
    assert document.head().seed == 7
    assert not load_recipe(path, ["sft=null"]).has("sft")


def test_scalars_hold_no_surprises(folder: Path) -> None:
    text = (
        "a: 1e-5\nb: no\nc: 010\nd: 1:30\ne: 2026-01-02\nf: ''\ng: .5\nh: 0x10\ni: ~\nj: -1_000\n"
    )
    values = load_recipe(recipe(text)).values
    assert list(values.values()) == [1e-5, "no", 10, "1:30", "2026-01-02", "", 0.5, 16, None, -1000]


def test_paths_start_at_the_file_that_writes_them_and_overrides_at_the_cwd(folder: Path) -> None:
    recipe("data: {sft: rows.jsonl, prompts: /abs/p.jsonl}\nrl: {store: s}", "lib/base.yaml")
    document = load_recipe(
        recipe("extends: ../lib/base.yaml\nname: t\nmodel: {path: m}", "mine/recipe.yaml"),
        ["data.heldout=held.jsonl", "teacher.path=~/t"],
    )
    head, section = document.stage("rl", RlSection)
    assert head.data.sft is not None and head.data.sft.resolve() == folder / "lib/rows.jsonl"
    assert head.data.prompts == Path("/abs/p.jsonl")
    assert head.data.heldout == folder / "held.jsonl"
    assert head.model is not None and head.model.path == folder / "mine/m"
    assert head.teacher is not None and head.teacher.path == Path.home() / "t"
    assert section.store is not None and section.store.resolve() == folder / "lib/s"


def test_the_resolved_recipe_reads_back_as_itself(folder: Path) -> None:
    text = "extends: b.yaml\nname: t\ndata: {sft: x.jsonl}\nrl: {quotas: {'no': 1.0}}\n"
    recipe("sft: {trainer: {learning_rate: 1e-5}}", "b.yaml")
    resolved = load_recipe(recipe(text)).resolved()
    again = load_recipe(recipe(resolved, "elsewhere/recipe.yaml"))
    assert again.head().data.sft == folder / "x.jsonl"
    assert again.section("rl", RlSection).quotas == {"no": 1.0}
    assert again.section("sft", SftSection).trainer.learning_rate == 1e-5
    assert again.resolved() == resolved
    assert yaml.safe_load(resolved)["rl"]["quotas"] == {"no": 1.0}


def test_fingerprints_see_values_and_not_layout(folder: Path) -> None:
    one = load_recipe(recipe("name: t\nrl: {group_size: 4}\nseed: 1"))
    two = load_recipe(recipe("seed: 1 # same\nrl:\n  group_size: 4\nname: u"))
    three = load_recipe(recipe("name: t\nrl: {group_size: 5}\nseed: 1"))
    assert one.fingerprint("rl", "seed") == two.fingerprint("rl", "seed")
    assert one.fingerprint("rl") != three.fingerprint("rl")
    assert one.fingerprint() != two.fingerprint()


# --- every error, with file and line ----------------------------------------------------------


def test_all_errors_come_at_once_in_the_order_of_the_lines(folder: Path) -> None:
    text = """\
name: tiny
sed: 3
data: {sft: a.jsonl, max_bad_rows: -1}
rl:
  group_szie: 8
  loss: {kind: aipo, capp: 1}
  quotas: {math: 0.4, code: 0.4}
  rounds:
    - {warmup: 1}
    - learning_rate: fast
"""
    assert rl_errors(text, "rl.group_size=1", "rl.rounded=2", "seed=true") == [
        "override 1 (rl.group_size=…): rl.group_size must be at least 2, got 1",
        "override 2 (rl.rounded=…): rl.rounded is not a key; did you mean 'rounds'?",
        "override 3 (seed=…): seed must be a whole number, got 'true'",
        "recipe.yaml:2: sed is not a key; did you mean 'seed'?",
        "recipe.yaml:3: data.max_bad_rows must be at least 0, got -1",
        "recipe.yaml:5: rl.group_szie is not a key; did you mean 'group_size'?",
        "recipe.yaml:6: rl.loss.capp is not a key; did you mean 'cap'?",
        "recipe.yaml:7: rl.quotas must sum to 1, got 0.8",
        "recipe.yaml:10: rl.rounds[1].learning_rate must be a number, got 'fast'",
    ]


BAD_SECTIONS = {
    "group_size: 2.5": "rl.group_size must be a whole number, got 2.5",
    "group_size: many": "rl.group_size must be a whole number, got 'many'",
    "group_size: null": "rl.group_size must be a whole number, got nothing (null)",
    "group_size: [1, 2]": "rl.group_size must be a whole number, got a list",
    "loss: aipo": "rl.loss must be a mapping, got 'aipo'",
    "loss: {}": "rl.loss needs the key 'kind'",
    "loss: {kind: ppo}": "rl.loss has a 'kind' that must be 'clip', 'aipo'",
    "rounds: {warmup: 1}": "rl.rounds must be a list, got a mapping",
    "rounds: [{kind: adam}]": (
        "rl.rounds[0].kind must be 'adamw' or 'sgd', got 'adam'; did you mean 'adamw'?"
    ),
    "rounds: [{learning_rate: nan}]": (
        "rl.rounds[0].learning_rate must be a finite number, got 'nan'"
    ),
    "rounds: [{learning_rate: 0}]": "rl.rounds[0].learning_rate must be greater than 0, got 0",
    "store: 3": "rl.store must be a path, got 3",
    "group_size: 99999999999999999999": "99999999999999999999… is too large a number",
    "_target_: os.system": (
        "'_target_' is not a key: a recipe names parts by their registered name, "
        "never by an import path"
    ),
    "loss: !!python/object/apply:os.system ['true']": (
        "the tag '!!python/object/apply:os.system' is refused; a recipe is plain YAML"
    ),
    "store: !!binary aGk=": "the tag '!!binary' is refused; a recipe is plain YAML",
    "group_size: 2\n  group_size: 3": "rl.group_size is given twice, first at recipe.yaml:3",
    "quotas: {1: 0.5}": "a key must be text, got 1; quote it",
    "<<: {group_size: 2}": "'<<' is not supported; use `extends:`",
}


@pytest.mark.parametrize("line", BAD_SECTIONS)
def test_a_bad_section_is_one_sentence_with_its_line(folder: Path, line: str) -> None:
    at = 4 if "\n" in line else 3
    assert rl_errors(f"name: t\nrl:\n  {line}\n") == [f"recipe.yaml:{at}: {BAD_SECTIONS[line]}"]


def message(text: str | bytes, *overrides: str) -> str:
    path = Path("recipe.yaml")
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides).head()
    error = caught.value
    return f"{error.where}: {error.what}" if error.where else error.what


BAD_FILES = {
    "": "recipe.yaml: name is missing",
    "- a\n- b": "recipe.yaml:1: a recipe is a mapping of keys to values",
    "name: t\nrl: [1, 2": "recipe.yaml:2: not valid YAML: while parsing a flow sequence "
    "expected ',' or ']', but got '<stream end>'",
    "name: t\n\tseed: 1": "recipe.yaml:2: not valid YAML: while scanning for the next token "
    "found character '\\t' that cannot start any token",
    "name: ../evil": "recipe.yaml:1: name must match ^[A-Za-z0-9][A-Za-z0-9._-]*$, got '../evil'",
    "name: t\nsft:": "recipe.yaml:2: sft is empty; write 'sft: {}' for its defaults, "
    "or leave it out",
    "name: t\nevalute: {}": "recipe.yaml:2: evalute is not a key; did you mean 'evaluate'?",
    "name: t\nextends: gone.yaml": "recipe.yaml:2: extends names 'gone.yaml', which is not a file",
    "name: t\nextends: [a]": "recipe.yaml:2: extends must be the path of one recipe",
    "name: t\nextends: recipe.yaml": "recipe.yaml: `extends` goes in a circle: "
    "recipe.yaml → recipe.yaml",
    b"name: \xff\xfe": "recipe.yaml:1: a recipe is UTF-8 text",
    b"name: a\x00b": "recipe.yaml: not valid YAML: unacceptable character #x0000: "
    "special characters are not allowed",
    "a: " + "[" * 40 + "]" * 40: "recipe.yaml:1: values may be nested 32 deep at most",
    "#" * (MAX_BYTES + 1): "recipe.yaml: a recipe has at most 262144 bytes, this one has more",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=[str(text)[:24] for text in BAD_FILES])
def test_a_bad_file_is_one_sentence(folder: Path, text: str | bytes) -> None:
    assert message(text) == BAD_FILES[text]


BAD_OVERRIDES = {
    "seed": "override 1 (seed): an override is key.path=value, like rl.group_size=8",
    "seed=": "override 1 (seed=…): seed needs a value; write null for none",
    "seed=two": "override 1 (seed=…): seed must be a whole number, got 'two'",
    "name.x=1": "override 1 (name.x=…): name is not a mapping",
    "data.sfft=a": "override 1 (data.sfft=…): data.sfft is not a key; did you mean 'sft'?",
    "seed=[1": "override 1 (seed=…): not valid YAML: while parsing a flow sequence "
    "expected ',' or ']', but got '<stream end>'",
    "sft._target_=os.system": "override 1 (sft._target_=…): '_target_' is not a key: "
    "parts are named, never imported",
    "seed=!!python/name:os.system": "override 1 (seed=…): the tag '!!python/name:os.system' "
    "is refused; a recipe is plain YAML",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_named_by_its_number(folder: Path, override: str) -> None:
    assert message("name: t", override) == BAD_OVERRIDES[override]


def test_an_alias_bomb_costs_nothing_and_is_refused(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    found = message("\n".join(lines))
    assert found.endswith(
        "a recipe holds at most 20000 values, 32 deep; its aliases unfold to more"
    )


def test_an_alias_of_itself_is_refused(folder: Path) -> None:
    assert "its aliases unfold to more" in message("a: &a {b: *a}")


def test_text_that_looks_like_a_resolver_stays_text(folder: Path) -> None:
    values = load_recipe(recipe("name: '${oc.env:HOME}'\nsystems: {pools: {any: ['{{ 7*7 }}']}}"))
    assert values.values["name"] == "${oc.env:HOME}"
    assert values.values["systems"] == {"pools": {"any": ["{{ 7*7 }}"]}}


def test_a_missing_recipe_and_a_folder_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone.yaml: cannot read the recipe \(No such file"):
        load_recipe(Path("gone.yaml"))
    with pytest.raises(RecipeError, match="a recipe is a regular file"):
        load_recipe(folder)


def test_an_absent_section_is_named_with_the_nearest_one(folder: Path) -> None:
    path = recipe("name: t\nrll: {}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path).section("rl", RlSection)
    assert caught.value.what == (
        "recipe.yaml: the section 'rl' is missing, so this stage is off; did you mean 'rll'?"
    )


def test_errors_of_an_extended_file_name_that_file(folder: Path) -> None:
    recipe("name: t\nrl:\n  group_sise: 1", "base/b.yaml")
    recipe("extends: ../base/b.yaml\nrl: {rounds: 3}", "mine/r.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("mine/r.yaml")).stage("rl", RlSection)
    assert caught.value.what.splitlines() == [
        "base/b.yaml:3: rl.group_sise is not a key; did you mean 'group_size'?",
        "mine/r.yaml:2: rl.rounds must be a list, got 3",
    ]


def test_head_leaves_the_stages_alone_and_a_whole_model_does_not(folder: Path) -> None:
    document = load_recipe(recipe("name: t\nsft: {nonsense: 1}"))
    assert document.head().name == "t"
    with pytest.raises(RecipeError, match=r"sft\.nonsense is not a key"):
        document.section("sft", SftSection)


KEYS = st.sampled_from(["group_size", "loss", "quotas", "rounds", "store"])


@settings(max_examples=60)
@given(key=KEYS, at=st.integers(0, 3), letter=st.sampled_from("xqz"))
def test_any_misspelt_key_is_named_with_its_line_and_its_neighbour(
    tmp_path_factory: pytest.TempPathFactory, key: str, at: int, letter: str
) -> None:
    wrong = key[:at] + letter + key[at:]
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(f"name: t\nrl:\n  {wrong}: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path).stage("rl", RlSection)
    assert caught.value.what == f"{path}:3: rl.{wrong} is not a key; did you mean '{key}'?"


def test_reading_a_recipe_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys, ground.recipe, ground.config, ground.run, ground.lock, ground.trail\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
