"""From a Hugging Face folder (SmolLM3, Llama or Qwen3) to a checkpoint of ours with its recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.arithmetic import num_parameters, parameter_shapes
from model.hf_config_types import REQUIRED, check_types
from model.hf_files import SafetensorsReader, open_safetensors
from model.hf_folder import tokenizer_vocab_size
from model.hf_mapping import LLAMA, QWEN3, SMOLLM3, fuse_from_hf, hf_shapes, no_rope_layer_of, parameter_map
from model.whole_folder import check_replaceable, whole_folder
from nanotron_recipes.errors import UserError, shorten, user_error
from nanotron_recipes.loading import dump_yaml, recipe_from_mapping
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    import torch

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    SMOLLM3: {"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "max_position_embeddings": 32768},
    LLAMA: {"tie_word_embeddings": False, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
    QWEN3: {"tie_word_embeddings": False, "rope_theta": 10_000.0, "max_position_embeddings": 32768},
}


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote."""

    out: Path
    hf_class: str
    num_parameters: int
    dtype: str
    notes: tuple[str, ...]
    """What the folder says and the checkpoint does not keep, one line each."""


def import_hf(hf_dir: Path, out: Path) -> ImportReport:
    """Write the model in the Hugging Face folder `hf_dir` as the checkpoint folder `out`, in its own dtype.

    `out` gets the tensors and a recipe.yaml whose model section describes them, and appears whole or not at all. Raises
    UserError, naming file and key, for whatever our model does not compute: another class, biases, scaled RoPE, sliding
    windows, layers without RoPE that are not every n-th, …; and for tensors with values that are not finite.
    """
    check_replaceable(out)
    config = read_config(hf_dir)
    tokenizer_vocab_size(hf_dir)  # a tokenizer that cannot be read would be found only by whoever uses the recipe
    from parallel.checkpoint import save_tensors  # and torch, which takes seconds

    with open_safetensors(hf_dir) as reader:
        recipe = recipe_of(config, hf_dir, stored_dtype(reader, config, hf_dir))
        check_tensors(reader, recipe, hf_dir)
        with whole_folder(out) as folder:
            # In there, so that whatever is left of a killed import lies in the folder that the next one removes.
            written = folder / "checkpoint"
            save_tensors(written, our_tensors(reader, recipe, hf_dir), {"step": 0}, {"recipe.yaml": dump_yaml(recipe)})
            for path in written.iterdir():
                path.rename(folder / path.name)
            written.rmdir()
    return ImportReport(
        out, config["architectures"][0], num_parameters(recipe), recipe.model.dtype, _notes(config, recipe)
    )


def _notes(config: dict[str, Any], recipe: Recipe) -> tuple[str, ...]:
    ends, kept = config.get("eos_token_id"), recipe.model.architecture.eos_token_id
    if not isinstance(ends, list) or set(ends) == {kept}:
        return ()
    return (f"eos_token_id: {ends}: {kept} is kept, the first; an export's generation ends at no other token",)


def our_tensors(reader: SafetensorsReader, recipe: Recipe, hf_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Our global tensors by name, the vocabulary padded with zero rows, one at a time. Raises UserError for a tensor
    with values that are not finite: every loss of such a model is NaN."""

    def read(name: str) -> torch.Tensor:
        tensor = reader.read(name)
        if not tensor.isfinite().all():
            raise UserError(f"{hf_dir}: {name}: NaN or infinite values, expected finite ones")
        return tensor

    padded = parameter_shapes(recipe, padded=True)
    for entry in parameter_map(recipe):
        yield entry.name, fuse_from_hf(entry, read, padded[entry.name][0])


def read_config(hf_dir: Path) -> dict[str, Any]:
    """config.json of a folder, checked to be of a model we compute; the class's defaults filled in."""
    path = hf_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: missing; expected a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise user_error("expected a JSON object, the configuration of a model", source=str(path), value=config)
    architecture = _architecture(config, str(path))
    check_types(config, str(path))
    config = _CLASS_DEFAULTS[architecture] | {key: value for key, value in config.items() if value is not None}
    config |= _rope_parameters(config, path)
    _refuse_what_we_do_not_compute(config, path)
    return config


def _architecture(config: dict[str, Any], source: str) -> str:
    """The class of the model: it is told before its other keys, which other classes call otherwise."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if not isinstance(first, str) or first not in _CLASS_DEFAULTS:
        expected = f"expected a list with one of {', '.join(_CLASS_DEFAULTS)}"
        raise user_error(expected, source=source, key="architectures", value=named)
    return first


def _rope_parameters(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """{"rope_theta": …} from transformers 5's rope_parameters, or nothing where an older file has it at the top."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key, {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{path}: {key}: {shorten(str(rope), 100)}, expected rope_type default without scaling")
    theta = config.get("rope_parameters", {}).get("rope_theta")
    return {} if theta is None else {"rope_theta": theta}


def _refuse_what_we_do_not_compute(config: dict[str, Any], path: Path) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    expected: dict[str, tuple[Any, ...]] = {
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "attention_dropout": (None, 0),
        "use_sliding_window": (None, False),
        "hidden_act": (None, "silu"),
        "quantization_config": (None,),
        "head_dim": (None, head_dim),
    }
    # Qwen3's class default is 128 whatever the sizes are; a file that leaves the key out means that.
    if config["architectures"][0] == QWEN3 and config.get("head_dim") is None:
        config = config | {"head_dim": 128}
    for key, allowed in expected.items():
        if config.get(key) not in allowed:
            shown = shorten(str(config[key]), 100)
            raise UserError(f"{path}: {key}: {shown}, expected {json.dumps(allowed[-1])}; we have nothing else")
    if any(kind != "full_attention" for kind in config.get("layer_types", ())):
        shown = shorten(str(config["layer_types"]), 100)
        raise UserError(f"{path}: layer_types: {shown}, expected full_attention in every layer")


def stored_dtype(reader: SafetensorsReader, config: dict[str, Any], hf_dir: Path) -> str:
    """The one dtype of all tensors that are used: "float32" or "bfloat16"; UserError for any other or a mixture."""
    unused = {_HEAD} if config["tie_word_embeddings"] else set()
    kinds = sorted({reader.dtype(name) for name in _without_rotary(reader.names) - unused})
    if len(kinds) != 1 or kinds[0] not in _DTYPES:
        raise UserError(
            f"{hf_dir}: the tensors are {', '.join(kinds)}, expected all float32 (F32) or all bfloat16 (BF16)"
        )
    return _DTYPES[kinds[0]]


def check_tensors(reader: SafetensorsReader, recipe: Recipe, hf_dir: Path) -> None:
    """UserError where a tensor that the configuration implies is missing, has another shape, or one is left over."""
    shapes = hf_shapes(recipe)
    for name, shape in shapes.items():
        if name not in reader.names:
            raise UserError(f"{hf_dir}: tensor {name} is missing, which config.json implies")
        if reader.shape(name) != shape:
            raise UserError(f"{hf_dir}: tensor {name} is {list(reader.shape(name))}, expected {list(shape)}")
    extra = _without_rotary(reader.names) - set(shapes) - {_HEAD}
    if extra:
        raise UserError(f"{hf_dir}: tensor {min(extra)} has no place in the model that config.json describes")
    if recipe.model.architecture.tie_word_embeddings and _HEAD in reader.names:
        _check_unused_head(reader, hf_dir)


def _without_rotary(names: set[str]) -> set[str]:
    """Old files store the rotary frequencies, which follow from the configuration: nobody reads them."""
    return {name for name in names if not name.endswith("rotary_emb.inv_freq")}


def _check_unused_head(reader: SafetensorsReader, hf_dir: Path) -> None:
    """A head beside tied embeddings is a copy of them, or else transformers does not tie them."""
    import torch

    embedding, head = reader.read(_EMBEDDING), reader.read(_HEAD)
    if not torch.equal(head.to(embedding.dtype), embedding):
        raise UserError(
            f"{hf_dir / 'config.json'}: tie_word_embeddings: true: expected no tensor {_HEAD} that differs from "
            f"{_EMBEDDING}; set tie_word_embeddings to false in config.json to keep it"
        )


def recipe_of(config: dict[str, Any], hf_dir: Path, dtype: str) -> Recipe:
    """The recipe whose model section describes `config` (as `read_config` returns it), weights stored in `dtype`.

    Its run is empty: one step, no data stage. The tokenizer is the folder's, where it has one.
    """
    name = config["architectures"][0]
    heads = config["num_attention_heads"]
    eos = config.get("eos_token_id")
    architecture = {key: config[key] for key in REQUIRED} | {
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "hidden_act": "silu",
        "max_position_embeddings": config["max_position_embeddings"],
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": float(config["rope_theta"]),
        "no_rope_layer": _no_rope_layer(config, str(hf_dir / "config.json")) if name == SMOLLM3 else None,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "use_qk_norm": name == QWEN3,
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": eos[0] if isinstance(eos, list) else eos,
        "pad_token_id": config.get("pad_token_id"),
    }
    mapping: dict[str, Any] = {
        "general": {"project": "imported", "purpose": f"imported from {hf_dir.resolve().name}"},
        "model": {
            "dtype": dtype,
            "model_config": architecture,
            "init_method": {"std": config.get("initializer_range", 0.02)},
            "make_vocab_size_divisible_by": 1,
        },
        "tokens": {
            "sequence_length": min(4096, config["max_position_embeddings"]),
            "train_steps": 1,
            "micro_batch_size": 1,
            "global_batch_size": 1,
        },
    }
    if (hf_dir / "tokenizer.json").is_file():
        mapping["tokenizer"] = {"tokenizer_name_or_path": str(hf_dir.resolve())}
    return recipe_from_mapping(mapping, source=str(hf_dir / "config.json")).recipe


def _no_rope_layer(config: dict[str, Any], source: str) -> int | None:
    layers, listed = config["num_hidden_layers"], config.get("no_rope_layers")
    if listed is None:
        interval = config.get("no_rope_layer_interval", 4)
        listed = [int((layer + 1) % interval != 0) for layer in range(layers)]
    return no_rope_layer_of(listed, source)
