from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from launch.evaluate.arithmetic_task import arithmetic_accuracy, boxed_answer
from launch.evaluate.generation import Generator, generate_samples
from nanotron_recipes.errors import UserError


@dataclass(frozen=True)
class Problem:
    question: str
    answer: int


PROBLEMS = [Problem("Compute 47+86?", 133), Problem("Compute 9-2?", 7), Problem("What is 5+5?", 10)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def learnt_by_heart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SmolLM3 folder whose model knows the answers of PROBLEMS and nothing else; characters are its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

    texts = [f"{problem.question}\nThe answer is \\boxed{{{problem.answer}}}.\n" for problem in PROBLEMS]
    characters = sorted(set("".join(texts) + "_:()"))
    vocabulary = {token: number for number, token in enumerate(["<|end|>", "<|pad|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    ids = torch.tensor([fast(text.ljust(70, "_")).input_ids for text in texts])
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = SmolLM3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("exports") / "export"
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_right_and_wrong_answers_are_counted(learnt_by_heart: Path) -> None:
    problems = [*PROBLEMS, Problem("Compute 47+86?", 134)]
    result = arithmetic_accuracy(learnt_by_heart, problems, batch=3)
    assert (result.correct, result.total, result.accuracy) == (3, 4, 0.75)
    assert [example.correct for example in result.examples] == [True, True, True, False]
    assert result.examples[0].written == r"The answer is \boxed{133}", "writing stops at the closed box"


def test_left_padded_batches_write_what_single_prompts_write(learnt_by_heart: Path) -> None:
    generator = Generator(learnt_by_heart)
    prompts = ["Compute 47+86?\n", "Wh", "C", "What is 5+5?"]
    together = generator.continue_texts(prompts, max_new_tokens=30)
    alone = [generator.continue_texts([prompt], max_new_tokens=30)[0] for prompt in prompts]
    assert together == alone
    assert together[3].startswith("\nThe answer is")


def test_what_a_tokenizer_puts_around_a_text_is_left_out_as_in_training(learnt_by_heart: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    adding = shutil.copytree(learnt_by_heart, tmp_path / "adding")
    tokenizer = Tokenizer.from_file(str(adding / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> <|end|> $A", None, [("<|end|>", 0)])
    tokenizer.save(str(adding / "tokenizer.json"))
    prompts = ["Compute 47+86?\n", "What is 5+5?", "C"]
    expected = Generator(learnt_by_heart).continue_texts(prompts, max_new_tokens=30)
    assert Generator(adding).continue_texts(prompts, max_new_tokens=30) == expected


def test_sampling_is_reproducible_by_its_seed(learnt_by_heart: Path) -> None:
    generator = Generator(learnt_by_heart)
    first, again, other = (
        generator.continue_texts(["C"] * 4, max_new_tokens=30, temperature=2.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_sample_is_written_for_every_kind_of_prompt(learnt_by_heart: Path) -> None:
    samples = generate_samples(Generator(learnt_by_heart), {"sum": "Compute 9-2?", "other": "What"}, max_new_tokens=24)
    assert [sample.kind for sample in samples] == ["sum", "other"]
    assert r"\boxed{7}" in samples[0].text


def test_nothing_is_written_beyond_the_models_longest_sequence(
    learnt_by_heart: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short"
    shutil.copytree(learnt_by_heart, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 20}
    (short / "config.json").write_text(json.dumps(config))
    generator = Generator(short)
    first, second, third = generator.continue_texts(
        ["Compute 47+86?\n", "C", "C" * 30], max_new_tokens=48, batch_size=1
    )
    assert (len(first), len(second), third) == (5, 19, "")
    whole = Generator(learnt_by_heart).continue_texts(["Compute 47+86?\n"], max_new_tokens=48)
    assert whole[0].startswith(first)
    assert "maximum length" not in caplog.text + capfd.readouterr().err


def test_the_first_box_is_the_answer() -> None:
    assert boxed_answer(r"so \boxed{ 13 } or \boxed{14}") == "13"
    assert boxed_answer(r"\boxed{-5}.") == "-5"
    assert boxed_answer(r"The answer is \boxed{1") is None


def test_a_folder_without_a_tokenizer_is_refused(learnt_by_heart: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((learnt_by_heart / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Generator(tmp_path)
