"""A config's keys: typed, all known, changed by --set; and every shipped recipe is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from trl import DPOConfig, SFTConfig

from posttraining.compare import CompareSettings
from posttraining.errors import Mistake
from posttraining.pairs.settings import PairsSettings
from posttraining.prefer import PreferSettings
from posttraining.settings import RECIPES, build, load, read_mapping
from posttraining.sft import SftSettings


@dataclass
class Inner:
    """A section."""

    length: int = 1
    kind: Literal["long", "short"] = "long"


@dataclass
class Outer:
    """A config."""

    name: str
    rate: float = 0.5
    steps: int | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    parts: list[Inner] = field(default_factory=list)


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


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("name: a\nname: b\n", [], "the key name stands twice"),
        ("- a\n", [], "expected a mapping"),
        ("name: [a\n", [], "not YAML"),
        ("name: a\n", ["rate"], "--set: 'rate': expected key=value"),
        ("name: a\n", ["name.length=3"], "name is not a section"),
        ("name: a\n", ["rate=[1"], "the value is not YAML"),
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
