"""Merging: the arithmetic, the lineage of all parents, and models that do not fit together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ANSWER, QUESTION
from safetensors.torch import load_file, save_file
from tiny_model import write_chat

from posttraining import lineage, merge
from posttraining.cli import main
from posttraining.errors import Mistake, StageFailed
from posttraining.files import whole_folder
from posttraining.generation import Generator
from posttraining.model_folder import INDEX
from posttraining.weights_average import write_average


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parents")
    one, two = write_chat(folder / "one", seed=1), write_chat(folder / "two", seed=2)
    (one / "metrics.jsonl").write_text("{}\n")
    return one, two


def config(tmp_path: Path, models: object, method: str = "linear") -> list[str]:
    file = tmp_path / "merge.yaml"
    file.write_text(json.dumps({"models": models, "method": method, "output_dir": str(tmp_path / "merged")}))
    return [str(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_linear_merge_is_the_weighted_sum_with_both_lineages(parents: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = parents
    merge.run(*config(tmp_path, [{"model": str(one), "weight": 0.9}, {"model": str(two), "weight": 0.1}]))
    merged, first, second = weights(tmp_path / "merged"), weights(one), weights(two)
    assert merged.keys() == first.keys()
    names = {file.name for file in one.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == names - {"metrics.jsonl"}
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.9 * first[name] + 0.1 * second[name], rtol=0, atol=1e-7)
    last = lineage.read(tmp_path / "merged")[-1]  # type: ignore[index]
    assert (last["stage"], last["parent"]) == ("merge", [lineage.weights_sha256(one), lineage.weights_sha256(two)])
    assert lineage.matches_weights(tmp_path / "merged")
    assert lineage.stage_names(tmp_path / "merged").count("sft") == 2


def test_a_merged_model_speaks_and_stops_like_its_parents(taught: Path, tmp_path: Path) -> None:
    merge.run(*config(tmp_path, [{"model": str(taught)}] * 2, "soup"))
    generator = Generator(str(tmp_path / "merged"))
    (answer,) = generator([[{"role": "user", "content": QUESTION}]], max_new_tokens=60, temperature=0, seed=0)
    assert (answer.text, answer.stopped) == (ANSWER, True)
    assert generator.model.generation_config.eos_token_id[0] == generator.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generator.tokenizer.pad_token_id not in generator.model.generation_config.eos_token_id


def test_a_soup_of_one_model_with_itself_is_that_model(parents: tuple[Path, Path], tmp_path: Path) -> None:
    merge.run(*config(tmp_path, [{"model": str(parents[0])}] * 3, "soup"))
    for name, tensor in weights(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, weights(parents[0])[name], rtol=1e-6, atol=1e-7)


def test_shards_may_be_cut_differently_and_dtypes_are_the_firsts(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 2), "steps": torch.tensor([3])}
    one, two, merged = (tmp_path / name for name in ("one", "two", "merged"))
    for folder in (one, two, merged):
        folder.mkdir()
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file({"a": half["a"]}, one / "model-1.safetensors")
    save_file({"b": half["b"], "steps": half["steps"]}, one / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "steps": "model-2.safetensors"}
    (one / INDEX).write_text(json.dumps({"weight_map": places}))
    save_file({**tensors, "a": tensors["a"] + 2}, two / "model.safetensors")
    assert write_average([one, two], [0.5, 0.5], merged) == 3
    result = load_file(merged / "model-1.safetensors") | load_file(merged / "model-2.safetensors")
    assert torch.equal(result["a"], (tensors["a"] + 1).bfloat16())
    assert torch.equal(result["steps"], tensors["steps"])
    assert (merged / INDEX).read_bytes() == (one / INDEX).read_bytes()


def changed(parents: tuple[Path, Path], tmp_path: Path, file: str, old: str, new: str) -> list[str]:
    other = tmp_path / "other"
    shutil.copytree(parents[1], other)
    text = (other / file).read_text(encoding="utf-8")
    assert old in text
    (other / file).write_text(text.replace(old, new), encoding="utf-8")
    return config(tmp_path, [{"model": str(parents[0]), "weight": 0.5}, {"model": str(other), "weight": 0.5}])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("chat_template.jinja", "im_end", "im_stop"),
        ("tokenizer.json", '"<|pad|>"', '"<|nothing|>"'),
        ("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'),
    ],
)
def test_another_tokenizer_or_template_is_refused(
    parents: tuple[Path, Path], tmp_path: Path, file: str, old: str, new: str
) -> None:
    with pytest.raises(Mistake, match=file):
        merge.run(*changed(parents, tmp_path, file, old, new))
    assert not (tmp_path / "merged").exists()


def soup(parents: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """A soup of copies of both, `one` and `two`."""
    folders = [Path(shutil.copytree(parent, tmp_path / parent.name)) for parent in parents]
    return config(tmp_path, [{"model": str(folder)} for folder in folders], "soup")


def refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a merge ends that leaves nothing."""
    with pytest.raises(SystemExit) as ended:
        main(["merge", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))
    return error


@pytest.mark.parametrize("step", ["load_model", "_check_alike", "_copy_settings", "find_not_finite"])
def test_a_model_that_is_removed_meanwhile_is_named(
    step: str,
    parents: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, original = soup(parents, tmp_path), getattr(merge, step)

    def removes(*arguments: Path) -> object:
        result = original(*arguments)
        shutil.rmtree(tmp_path / "two")
        return result

    monkeypatch.setattr(merge, step, removes)
    assert str(tmp_path / "two") in refused(words, tmp_path, capsys)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "training_lineage.json"]
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, parents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, file = soup(parents, tmp_path), tmp_path / "two" / name
    file.write_bytes(b"\xff\xfe{")
    assert name in refused(words, tmp_path, capsys)
    if name == "training_lineage.json":
        return  # without one a model may be merged
    for target in ("nowhere", name):
        file.unlink()
        file.symlink_to(target)
        assert str(tmp_path / "two") in refused(words, tmp_path, capsys)


def test_a_mean_beyond_the_dtype_of_the_first_is_not_published(parents: tuple[Path, Path], tmp_path: Path) -> None:
    words = soup(parents, tmp_path)
    for name, change in (("one", torch.Tensor.half), ("two", lambda tensor: tensor + 1e6)):
        file = tmp_path / name / "model.safetensors"
        save_file({key: change(tensor) for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        (tmp_path / name / lineage.FILE).unlink()
    with pytest.raises(StageFailed, match="has values beyond those of its dtype"):
        merge.run(*words)
    assert not (tmp_path / "merged").exists()


def test_what_a_killed_merge_left_is_removed(parents: tuple[Path, Path], tmp_path: Path) -> None:
    words = config(tmp_path, [{"model": str(parent)} for parent in parents], "soup")
    with whole_folder(tmp_path / "merged") as part:
        left = shutil.copytree(part.parent, tmp_path / "left")
    (left / "part" / "model-of-other-settings.safetensors").write_text("cut")
    shutil.rmtree(tmp_path / "merged")
    left.rename(tmp_path / ".merged.work")
    merge.run(*words)
    assert not list((tmp_path / "merged").glob("*-of-*")) and not list(tmp_path.glob(".*"))


def test_models_of_another_shape_are_refused_by_the_tensors_name(parents: tuple[Path, Path], tmp_path: Path) -> None:
    wide = write_chat(tmp_path / "wide", hidden=32)
    models = [{"model": str(parents[0]), "weight": 0.5}, {"model": str(wide), "weight": 0.5}]
    with pytest.raises(Mistake, match=r"embed_tokens.weight: \(\d+, 32\): expected the shape \(\d+, 16\)"):
        merge.run(*config(tmp_path, models))


@pytest.mark.parametrize(
    ("given", "method", "reason"),
    [
        ([0.9, 0.2], "linear", "adding up to 1"),
        ([0.9, None], "linear", "adding up to 1"),
        ([1.0], "linear", "at least two models"),
        ([0.5, 0.5], "soup", "a soup is a plain average"),
    ],
)
def test_weights_that_make_no_average_are_refused(
    parents: tuple[Path, Path], tmp_path: Path, given: list[float | None], method: str, reason: str
) -> None:
    models = [{"model": str(parents[0]), "weight": weight} for weight in given]
    with pytest.raises(Mistake, match=reason):
        merge.run(*config(tmp_path, models, method))
