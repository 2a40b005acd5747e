from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.hf_export import export_tensors
from model.hf_files import open_safetensors
from model.hf_import import check_tensors, import_hf, our_tensors, read_config, recipe_of, stored_dtype
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from nanotron_recipes.recipe import Recipe
from parallel.checkpoint_files import verify_checkpoint_files

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "smollm3": ("SmolLM3", {}, "float32"),
    "smollm3_bf16_untied": ("SmolLM3", {"tie_word_embeddings": False}, "bfloat16"),
    "smollm3_every_3rd": ("SmolLM3", {"no_rope_layer_interval": 3}, "float32"),
    "smollm3_without_rope": ("SmolLM3", {"no_rope_layers": [0] * 6}, "float32"),
    "llama": ("Llama", {}, "bfloat16"),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, "float32"),
    "qwen3": ("Qwen3", {"head_dim": 8}, "float32"),
}


def built_by_transformers(folder: Path, kind: str, keys: dict[str, Any], dtype: str = "float32") -> Path:
    """A folder saved by transformers, weights random (norms too)."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES | keys)
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def read(hf_dir: Path) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """The recipe and our tensors of a folder, without writing a checkpoint."""
    config = read_config(hf_dir)
    with open_safetensors(hf_dir) as reader:
        recipe = recipe_of(config, hf_dir, stored_dtype(reader, config, hf_dir))
        check_tensors(reader, recipe, hf_dir)
        return recipe, dict(our_tensors(reader, recipe, hf_dir))


@pytest.mark.parametrize(("kind", "keys", "dtype"), MODELS.values(), ids=MODELS)
def test_import_then_export_is_bit_identical(kind: str, keys: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    hf_dir = built_by_transformers(tmp_path / "hf", kind, keys, dtype)
    recipe, tensors = read(hf_dir)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    again = load_recipe(str(tmp_path / "recipe.yaml")).recipe
    export_tensors(tensors.items(), again, tmp_path / "out")
    before, after = load_file(hf_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (hf_dir, tmp_path / "out"))
    # Written by some classes although they have no effect.
    for key in ("max_window_layers", "pretraining_tp", "no_rope_layer_interval"):
        old.pop(key, None), new.pop(key, None)
    assert new == old


def test_a_killed_import_leaves_nothing_that_the_next_one_does_not_remove(tmp_path: Path) -> None:
    folder, out = built_by_transformers(tmp_path / "hf", "SmolLM3", {}), tmp_path / "out"
    killed = """if True:
        import os, sys
        from pathlib import Path
        from model.hf_import import import_hf
        from parallel import checkpoint_writer
        checkpoint_writer._finish = lambda *_: os._exit(9)
        import_hf(Path(sys.argv[1]), Path(sys.argv[2]))
    """
    assert subprocess.run([sys.executable, "-c", killed, folder, out], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2, "it was killed while it wrote"
    import_hf(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert not verify_checkpoint_files(out, checksums=True)


def test_a_sharded_folder_is_read(tmp_path: Path) -> None:
    hf_dir = built_by_transformers(tmp_path / "hf", "SmolLM3", {})
    recipe, tensors = read(hf_dir)
    export_tensors(tensors.items(), recipe, tmp_path / "sharded", max_shard_bytes=20_000)
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    _, again = read(tmp_path / "sharded")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def smollm3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_by_transformers(tmp_path_factory.mktemp("models") / "hf", "SmolLM3", {})


def with_config(source: Path, folder: Path, **keys: Any) -> Path:
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "expected a list with one of SmolLM3ForCausalLM, LlamaForCausalLM, Qwen3ForCausal",
        ),
        ({"architectures": None}, "architectures: null: expected a list with one of"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ({"layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_parameters"),
        ({"no_rope_layers": [1, 0, 0, 1, 1, 1]}, "no_rope_layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 16}, "head_dim: 16, expected 8"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"num_hidden_layers": 5, "layer_types": None, "no_rope_layers": None}, "no place in the model"),
        ({"intermediate_size": 48}, r"expected \[48, 32\]"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(
    keys: dict[str, Any], message: str, smollm3_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read(with_config(smollm3_dir, tmp_path / "hf", **keys))


def with_tensors(source: Path, folder: Path, **tensors: torch.Tensor) -> Path:
    with_config(source, folder)
    stored = load_file(source / "model.safetensors") | tensors
    (folder / "model.safetensors").unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_head_of_its_own_beside_tied_embeddings_is_refused_as_transformers_would_use_it(
    smollm3_dir: Path, tmp_path: Path
) -> None:
    import transformers

    head = torch.randn(SIZES["vocab_size"], SIZES["hidden_size"])
    folder = with_tensors(smollm3_dir, tmp_path / "hf", **{"lm_head.weight": head})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, head), "what would be lost"
    with pytest.raises(UserError, match=r"lm_head.weight that differs .* set tie_word_embeddings to false in config"):
        read(folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    _, tensors = read(folder)
    assert any(torch.equal(tensor, head) for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_head_and_old_rotary_frequencies_are_left_out_whatever_their_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    source = built_by_transformers(tmp_path / "bf16", "SmolLM3", {}, "bfloat16")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    extra = {
        "lm_head.weight": embedding.to(dtype, copy=True),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    recipe, tensors = read(with_tensors(source, tmp_path / "hf", **extra))
    assert recipe.model.dtype == "bfloat16"
    assert tensors.keys() == read(source)[1].keys()


JUNK = [None, True, -1, 0, 1.5, 10**30, "x", "", [], [1], ["x"], [[]], {}, {"x": 1}, {"rope_theta": "x"}, float("nan")]
KEYS = [
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "no_rope_layer_interval", "no_rope_layers"),
    *("rms_norm_eps", "rope_theta", "initializer_range", "attention_dropout", "tie_word_embeddings", "attention_bias"),
    *("mlp_bias", "use_sliding_window", "hidden_act", "layer_types", "bos_token_id", "pad_token_id", "eos_token_id"),
    *("rope_parameters", "rope_scaling", "quantization_config"),
]


@pytest.mark.parametrize("key", KEYS)
def test_whatever_a_key_holds_it_is_read_or_refused_by_name(key: str, smollm3_dir: Path, tmp_path: Path) -> None:
    for number, value in enumerate(JUNK):
        folder = with_config(smollm3_dir, tmp_path / str(number), **{key: value})
        try:
            recipe_of(read_config(folder), folder, "float32")
        except UserError as error:
            assert str(folder / "config.json") in str(error) and key in str(error), f"{value}: {error}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": "SmolLM3ForCausalLM"}, "architectures: 'SmolLM3ForCausalLM': expected a list with one of"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0: expected a whole number of at least 1"),
        ({"vocab_size": True}, "vocab_size: true: expected a whole number"),
        ({"no_rope_layer_interval": 0, "no_rope_layers": None}, "no_rope_layer_interval: 0: expected"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "expected a 0 .no RoPE. or 1 for each of the 6 layers"),
        ({"no_rope_layers": [1, 1, 1, 2, 1, 1]}, "expected a 0 .no RoPE. or 1 for each"),
        ({"no_rope_layers": "111011"}, "no_rope_layers: '111011': expected a 0"),
        ({"eos_token_id": []}, "eos_token_id: ..: expected a token id, or a list of them"),
        ({"rope_parameters": [1]}, "rope_parameters: .1.: expected an object"),
        (
            {"num_hidden_layers": 10**9, "no_rope_layers": None},
            "num_hidden_layers: 1000000000: expected at most 10,000",
        ),
    ],
)
def test_a_value_of_another_type_is_refused(
    keys: dict[str, Any], message: str, smollm3_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_config(with_config(smollm3_dir, tmp_path / "hf", **keys))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "expected a JSON object"),
        (b"3", "3: expected a JSON object"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"{}", "architectures: null: expected a list with one of SmolLM3ForCausalLM"),
        (
            b'{"architectures": ["GPT2LMHeadModel"], "n_embd": 8}',
            r"architectures: \['GPT2LMHeadModel'\]: expected a list with one of",
        ),
        (b'{"architectures": ["LlamaForCausalLM"]}', "vocab_size: null: expected a whole number"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("files", [["../else.safetensors"], ["/else"], [3], [None], [["x"]], [""], ["a", "b/c"], {}])
def test_an_index_that_leads_out_of_its_folder_is_refused(files: Any, smollm3_dir: Path, tmp_path: Path) -> None:
    folder = with_config(smollm3_dir, tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict(zip("ab", files, strict=False)) if files else {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        read(folder)


def test_a_configuration_of_transformers_4_is_read(smollm3_dir: Path, tmp_path: Path) -> None:
    folder = with_config(smollm3_dir, tmp_path / "hf", rope_parameters=None, rope_theta=50000.0, rope_scaling=None)
    recipe, _ = read(folder)
    assert recipe.model.architecture.rope_theta == 50000.0
    assert recipe.model.architecture.no_rope_layer == 4


def test_missing_and_broken_files_are_named(smollm3_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: missing"):
        read(tmp_path)
    folder = with_config(smollm3_dir, tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        read(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors: missing"):
        read(folder)
    (folder / "model.safetensors").write_bytes((smollm3_dir / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read(folder)


@pytest.mark.parametrize(
    ("ends", "notes"), [(2, ()), ([2], ()), ([5, 2], ("eos_token_id: [5, 2]: 5 is kept, the first",))]
)
def test_tokens_that_end_a_text_beside_the_first_are_told(
    ends: Any, notes: tuple[str, ...], smollm3_dir: Path, tmp_path: Path
) -> None:
    report = import_hf(with_config(smollm3_dir, tmp_path / "hf", eos_token_id=ends), tmp_path / "out")
    assert len(report.notes) == len(notes) and all(map(str.startswith, report.notes, notes))


def test_half_precision_and_mixed_files_are_refused(smollm3_dir: Path, tmp_path: Path) -> None:
    folder = with_config(smollm3_dir, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    for number, dtypes in enumerate([(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]):
        (folder / "model.safetensors").unlink()
        save_file(
            {name: tensor.to(dtypes[min(i, 1)]) for i, (name, tensor) in enumerate(tensors.items())},
            folder / "model.safetensors",
        )
        with pytest.raises(UserError, match=("F16", "BF16, F32")[number]):
            read(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_with_which_no_loss_is_finite_are_refused(value: float, smollm3_dir: Path, tmp_path: Path) -> None:
    folder = with_config(smollm3_dir, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight: NaN or infinite values, expected finite ones"):
        import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
