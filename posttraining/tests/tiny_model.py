"""Models of a few thousand parameters, as the exporter would write them, and as SFT would leave them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from posttraining import lineage
from posttraining.chat import prepare_tokenizer
from posttraining.model_folder import load_model, load_tokenizer, save_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def write_base(folder: Path, *, seed: int = 0, hidden: int = 16, chat_tokens: bool = True) -> Path:
    """A base model with a token for each byte, no chat template, and the lineage that an export has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = SPECIAL if chat_tokens else SPECIAL[:1]
    vocabulary = {token: number for number, token in enumerate([*tokens, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    if chat_tokens:
        tokenizer.pad_token = "<|pad|>"
        tokenizer.add_tokens(["<think>", "</think>"])
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        no_rope_layers=[1, 0],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    SmolLM3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_first_lineage(folder, "pretrain")
    return folder


def write_chat(folder: Path, *, seed: int = 0, hidden: int = 16) -> Path:
    """An untrained model with chat template and a lineage in which it had SFT."""
    base = write_base(folder.with_name(f"{folder.name}-base"), seed=seed, hidden=hidden)
    model, tokenizer = load_model(base), load_tokenizer(base)
    prepare_tokenizer(tokenizer, model)
    save_model(model, tokenizer, folder)
    lineage.append(folder, base, "sft", {"model": str(base)}, "0" * 64)
    return folder


def _write_first_lineage(folder: Path, stage: str) -> None:
    (folder / lineage.FILE).unlink(missing_ok=True)
    lineage.append(folder, [], stage, {}, None)
