"""A config's keys: typed, all known, changed by --set; and every shipped recipe is one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from trl import DPOConfig, GRPOConfig, SFTConfig

from posttraining.compare import CompareSettings
from posttraining.errors import Mistake, mistake
from posttraining.pairs.settings import PairsSettings
from posttraining.prefer import PreferSettings
from posttraining.settings import RECIPES, build, load, read_mapping
from posttraining.sft import SftSettings
from posttraining.trainer_keys import trainer_keys


@dataclass
class Inner:
    """A section."""

    length: int = 1
    kind: Literal["long", "short"] = "long"

    def __post_init__(self) -> None:
        if self.length >= 13:
            raise mistake(None, "length", self.length, "expected less than 13")


@dataclass
class Outer:
    """A config."""

    name: str
    rate: float = 0.5
    steps: int | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    parts: list[Inner] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "a", "rat": 1}, "c.yaml: rat: unknown key; did you mean rate?"),
        ({"name": "a", "inner": {"lenght": 2}}, "c.yaml: inner.lenght: unknown key; did you mean inner.length?"),
        ({"name": "a", "parts": [{}, {"kind": "wide"}]}, "c.yaml: parts.1.kind: 'wide': expected long or short"),
        ({"rate": 1}, "c.yaml: name: is missing"),
        ({"name": 3}, "c.yaml: name: 3: expected text"),
        ({"name": "a", "steps": 1.5}, "c.yaml: steps: 1.5: expected a whole number or null"),
        ({"name": "a", "steps": True}, "c.yaml: steps: true: expected a whole number or null"),
        ({"name": "a", "flag": "yes"}, "c.yaml: flag: 'yes': expected true or false"),
        ({"name": "a", "rate": "fast"}, "c.yaml: rate: 'fast': expected a number"),
        ({"name": "a", "parts": {}}, "c.yaml: parts: {}: expected a list"),
        ({"name": "a", "inner": 3}, "c.yaml: inner: 3: expected a section"),
        ({"name": "a", "folders": ["x"]}, "c.yaml: folders: ['x']: expected a section"),
        ({"name": "a", "folders": {"x": 3}}, "c.yaml: folders.x: 3: expected text"),
        ({"name": "a", "parts": [{"length": 13}]}, "c.yaml: parts.0.length: 13: expected less than 13"),
    ],
)
def test_a_key_that_does_not_fit_is_named(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(Mistake) as caught:
        build(mapping, "c.yaml", (Outer,))
    assert str(caught.value) == message


def test_sections_and_lists_of_them_become_objects() -> None:
    (outer,) = build({"name": "a", "rate": 2, "parts": [{"length": 3}]}, "c.yaml", (Outer,))
    assert outer == Outer("a", rate=2.0, parts=[Inner(3)])
    assert isinstance(outer.rate, float)


def test_set_changes_any_key_and_reads_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: a\nrate: 1e-5\n")
    assert read_mapping(str(file), "x")[0] == {"name": "a", "rate": 1e-5}
    words = ["rate=3e-6", "inner.length=4", "parts=[{length: 2}]", "name='1'"]
    (outer,), mapping = load(str(file), "x", (Outer,), words)
    assert outer == Outer("1", rate=3e-6, inner=Inner(4), parts=[Inner(2)])
    assert mapping["inner"] == {"length": 4}


def test_set_reaches_into_lists(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: a\nparts: [{length: 2}, {kind: short}]\nsteps: null\n")
    words = ["parts.0.kind=short", "parts.1={length: 7}", "parts.2.length=9", "inner.length=3"]
    with pytest.raises(Mistake, match="from 0 to 1"):
        load(str(file), "x", (Outer,), words)
    words.insert(2, "parts.2={kind: short}")
    (outer,), _ = load(str(file), "x", (Outer,), words)
    assert outer.parts == [Inner(2, "short"), Inner(7), Inner(9, "short")]
    assert outer.inner == Inner(3)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("name: a\nname: b\n", [], "the key name stands twice"),
        ("- a\n", [], "expected a mapping"),
        ("name: [a\n", [], "not YAML"),
        ("name: a\n", ["rate"], "--set: 'rate': expected key=value"),
        ("name: a\n", ["name.length=3"], "name is not a section"),
        ("name: a\n", ["rate=[1"], "the value: not YAML"),
        ("name: a\n", ["rate=" + "[" * 5000], "--set: rate: the value: nested too deeply; expected at most 50 levels"),
        ("name: " + "[" * 5000, [], "c.yaml: nested too deeply; expected at most 50 levels"),
        ("name: " + "[" * 60 + "]" * 60, [], "c.yaml: nested too deeply; expected at most 50 levels"),
        ("name: &a [*a]\n", [], "c.yaml: not YAML: found unconstructable recursive node"),
        ("name: !!int a\n", [], "c.yaml: not YAML: invalid literal"),
        ("parts: [{}, {}]\n", ["parts.3.length=2"], "--set: parts.3.length: '3': expected an index from 0 to 1"),
        ("parts: [{}, {}]\n", ["parts.3=2"], "--set: parts.3: '3': expected an index from 0 to 2"),
        ("parts: [{}, {}]\n", ["parts.x.length=2"], "--set: parts.x.length: 'x': expected an index from 0 to 1"),
        ("parts: []\n", ["parts.0.length=2"], "--set: parts.0.length: '0': the list is empty"),
    ],
)
def test_a_file_or_an_override_that_cannot_be_read_is_named(
    text: str, words: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(Mistake, match="(?s).*" + message.replace("[", r"\[")):
        load(str(tmp_path / "c.yaml"), "x", (Outer,), words)


def test_a_recipe_that_is_not_shipped_is_named_with_those_that_are() -> None:
    with pytest.raises(Mistake, match=r"'tinny': no such recipe of the stage sft; .* did you mean tiny\?"):
        read_mapping("tinny", "sft")
    with pytest.raises(Mistake, match=r"runs/x\.yaml: no such file"):
        read_mapping("runs/x.yaml", "sft")
    for folder in (str(RECIPES / "tiny"), f"{RECIPES}/"):
        with pytest.raises(Mistake, match=r"recipes.*: is a folder; expected a YAML file, or the name of a shipped"):
            read_mapping(folder, "sft")


def test_trl_refuses_a_value_in_one_line() -> None:
    with pytest.raises(Mistake, match=r"^c\.yaml: cosinus is not a valid SchedulerType") as caught:
        keys = {"output_dir": "x", "lr_scheduler_type": "cosinus", "use_cpu": True, "bf16": False}
        build(keys, "c.yaml", (SFTConfig,))
    assert "\n" not in str(caught.value)


CLASSES: dict[str, tuple[type, ...]] = {
    "sft": (SftSettings, SFTConfig),
    "mid": (SftSettings, SFTConfig),
    "sft-baseline": (SftSettings, SFTConfig),
    "pairs": (PairsSettings,),
    "prefer": (PreferSettings, DPOConfig),
    "compare": (CompareSettings, DPOConfig),
}


@pytest.mark.parametrize(
    "recipe", sorted(path.relative_to(RECIPES) for path in RECIPES.glob("*/*.yaml") if path.stem in CLASSES), ids=str
)
def test_every_shipped_recipe_is_valid_and_a_typo_in_it_is_found(recipe: Path) -> None:
    classes = CLASSES[recipe.stem]
    # What a machine without a GPU cannot promise.
    cpu = ["bf16=false", "use_cpu=true"] if len(classes) > 1 else []
    load(str(RECIPES / recipe), recipe.stem, classes, cpu)
    with pytest.raises(Mistake, match="output_dirr: unknown key; did you mean output_dir"):
        load(str(RECIPES / recipe), recipe.stem, classes, [*cpu, "output_dirr=x"])


@pytest.mark.parametrize(
    ("stage", "cls"), [("sft", SFTConfig), ("prefer", DPOConfig), ("compare", DPOConfig), ("grpo", GRPOConfig)]
)
def test_the_keys_of_a_trainer_are_known_without_importing_it(stage: str, cls: type[Any]) -> None:
    names = trainer_keys(stage)
    assert names is not None
    assert {entry.name for entry in fields(cls)} <= names
    assert "learning_rat" not in names
    assert trainer_keys("merge") == set()
