"""Every mistake in a recipe is one line: where, which key, what value, what was expected, the nearest name."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanotron_recipes.errors import UserError, nearest_name, show_value, user_error
from nanotron_recipes.loading import load_recipe, recipe_from_mapping

A_TIME = "expected a time as sbatch writes it, like 1-12:00:00 (a day and a half), 12:00:00 or 90 (minutes)"


def message(path: object, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


MINIMAL = """\
general: {}
model:
  model_config:
    vocab_size: 64
    hidden_size: 16
    intermediate_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
tokens:
  sequence_length: 8
  train_steps: 4
  global_batch_size: 2
"""


def test_a_minimal_file_is_a_recipe(tmp_path: Path) -> None:
    loaded = load_recipe(str(write(tmp_path, MINIMAL)))
    assert loaded.notes == [] and loaded.name == "mine"
    assert loaded.recipe.model.architecture.num_key_value_heads == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tokens.trian_steps=3", "--set: tokens.trian_steps: 3: unknown key; did you mean train_steps?"),
        ("optimiser.clip_grad=1.0", "--set: optimiser: unknown key; did you mean optimizer?"),
        ("general.train_steps=3", "--set: general.train_steps: 3: unknown key; did you mean tokens.train_steps?"),
        ("model.dtype=bflot16", "expected 'float32' or 'bfloat16'; did you mean bfloat16?"),
        ("model.dtype=float16", "--set: model.dtype: 'float16': expected 'float32' or 'bfloat16'"),
        ("slurm.time=banana", f"--set: slurm.time: 'banana': {A_TIME}"),
        ("slurm.time=1.5", f"--set: slurm.time: '1.5': {A_TIME}"),
        ("slurm.time=-5", f"--set: slurm.time: '-5': {A_TIME}"),
        ("lighteval.slurm.time=1:2:3:4", f"--set: lighteval.slurm.time: '1:2:3:4': {A_TIME}"),
        ("slurm.qos=a b", "--set: slurm.qos: 'a b': expected text without spaces, of 1 to 500 characters"),
        ("logging.webhook_variable=1a", "expected the name of an environment variable (letters a to z, digits and _)"),
        ("parallelism.dp=many", "--set: parallelism.dp: 'many': expected an integer or 'auto'"),
        ("parallelism.dp=0", "--set: parallelism.dp: 0: expected at least 1"),
        ("tokens.train_steps=2.5", "--set: tokens.train_steps: 2.5: expected an integer"),
        ("tokens.train_steps='7'", "--set: tokens.train_steps: '7': expected an integer"),
        ("tokens.train_steps=true", "--set: tokens.train_steps: true: expected an integer"),
        ("tokens.sequence_length=null", "--set: tokens.sequence_length: null: expected an integer"),
        ("optimizer.optimizer_factory.adam_beta2=1.0", "1.0: expected less than 1"),
        ("optimizer.clip_grad=-1.0", "-1.0: expected more than 0"),
        ("optimizer.weight_decay=.nan", "expected a finite number"),
        ("model.model_config=3", "--set: model.model_config: 3: expected a section of keys"),
        ("data_stages.0.data.dataset.dataset_folder=[]", "expected at least one entry"),
        ("optimizer.zero_stage=true", "--set: optimizer.zero_stage: true: expected 0 or 1"),
        ("optimizer.zero_stage=1.0", "--set: optimizer.zero_stage: 1.0: expected 0 or 1"),
        ("optimizer.zero_stage=2", "--set: optimizer.zero_stage: 2: expected 0 or 1"),
        ("checkpoints.export_at_end=1", "--set: checkpoints.export_at_end: 1: expected true or false"),
        ("parallelism.tp=3", "--set: parallelism.tp: 3: does not divide num_attention_heads 4; expected one of 1, 2"),
        ("parallelism.tp=4", "does not divide num_key_value_heads 2; expected one of 1, 2"),
        ("model.model_config.hidden_size=66", "66: expected a multiple of num_attention_heads 4"),
        ("model.model_config.num_key_value_heads=3", "3: expected a divisor of num_attention_heads 4"),
        ("parallelism.pp=7", "--set: parallelism.pp: 7: expected at most num_hidden_layers 6"),
        ("tokens.micro_batch_size=5", "5: expected a divisor of a replica's 12 sequences"),
        ("parallelism.dp=5", "tokens.global_batch_size: 12: expected a multiple of dp 5 (dp may be 1, 2, 3, 4, 6, 12)"),
        ("tokens.batch_accumulation_per_replica=5", "tokens.batch_accumulation_per_replica: 5: expected"),
        ("tokens.global_batch_size=null", "tokens.global_batch_size: null: expected a number of sequences"),
        ("data_stages.0.start_training_step=2", "2: expected 1 for the first stage"),
        ("data_stages.2.start_training_step=551", "551: expected more than the stage before it, 551"),
        ("data_stages.0.data.dataset.dataset_weights=[1]", "expected 3 weights, one for each dataset_folder"),
        ("data_stages.0.data.dataset.dataset_weights=[1,1,-1]", "dataset_weights.2: -1: expected at least 0"),
        (
            "data_stages.0.data.dataset.dataset_weights=[0,0,0]",
            "expected at least one weight above 0, and a finite sum",
        ),
        ("data_stages.0.data.dataset.dataset_folder=[code,code,maths]", "'code': expected each folder once"),
        ("data_stages.0.data.dataset.vocab_size=2048", "2048: expected at most the model's vocab_size 1024"),
        ("optimizer.weight_decay_exclude_named_params=['.*embeding.*']", "'.*embeding.*': matches no parameter"),
        ("optimizer.weight_decay_exclude_named_params=['(']", "'(': expected a regular expression"),
        (
            r"optimizer.weight_decay_exclude_named_params=['(?:(?:\w|[a-z])+\.?)+[^\w\.]']",
            "expected a regular expression that does not go on for ever",
        ),
        ("checkpoints.checkpoints_path=ssd/{nodes}", "'ssd/{nodes}': {nodes} has no meaning; only {node}"),
        ("tokenizer.train.vocab_size=2000", "2000: expected at most model.model_config.vocab_size 1024"),
        ("tokenizer.tokenizer_name_or_path=gpt2", "'gpt2': expected null where tokenizer.train is set"),
        ("corpus.sources.0.reader=jsonl", "corpus.sources.0.path: null: expected the file or folder"),
        ("corpus.sources.1.name=prose", "'prose': expected a name of its own"),
        ("corpus.sources.1.reader=python", "did you mean python-"),
        ("model.model_config.eos_token_id=1024", "1024: expected less than vocab_size 1024"),
        ("checkpoints.checkpoints_path=s3://b/c", "'s3://b/c': expected a path of this machine, not a URL"),
        ("checkpoints.checkpoints_path=''", "--set: checkpoints.checkpoints_path: '': expected a path"),
        (
            "checkpoints.resume_checkpoint_path=gs://b",
            "resume_checkpoint_path: 'gs://b': expected a path of this machine",
        ),
        ("corpus.path=''", "--set: corpus.path: '': expected a path"),
        ("corpus.sources.0.path=https://x/y", "corpus.sources.0.path: 'https://x/y': expected a path of this machine"),
        (
            "data_stages.1.data.dataset.dataset_folder.2=gs://b/c",
            "data_stages.1.data.dataset.dataset_folder.2: 'gs://b/c': expected a path of this machine, or s3://bucket",
        ),
        ("data_stages.1.data.dataset.dataset_folder.2=s3://b", "'s3://b': expected a path of this machine, or s3://b"),
        ("data_stages.0.data.dataset.dataset_read_path=[/a]", "expected 3 paths, one for each dataset_folder"),
        ("data_stages.0.data.dataset.dataset_read_path=[/a, /b, /a]", "'/a': expected a place for each of "),
        ("data_stages.0.data.dataset.dataset_read_path=[/a, /b, s3://x/y]", "expected a path of this machine, not a U"),
        ("data_staging.endpoint_url=localhost:9000", "'localhost:9000': expected http:// or https://, a server"),
        ("data_staging.workers=0", "data_staging.workers: 0"),
        ("s3_upload.upload_s3_path=/nvme/x", "s3_upload.upload_s3_path: '/nvme/x': expected s3://bucket/prefix"),
        ("s3_upload.upload_s3_path=s3://bucket", "'s3://bucket': expected s3://bucket/prefix"),
        ("s3_upload.endpoint_url=localhost:9000", "'localhost:9000': expected http:// or https://, a server"),
        ("s3_upload.endpoint_url='https://me:secret@host'", "'(hidden)': expected no user, query or fragment in it"),
        ("s3_upload.endpoint_url='https://host?token=secret'", "'(hidden)': expected no user, query or fragment in it"),
        ("data_staging.endpoint_url='https://host/#secret'", "'(hidden)': expected no user, query or fragment in it"),
        (
            "s3_upload.endpoint_url='http://host:99999'",
            "'http://host:99999': expected http:// or https://, a server, and",
        ),
        ("s3_upload.max_backlog=0", "s3_upload.max_backlog: 0"),
        ("s3_upload.max_backlogs=2", "did you mean max_backlog?"),
        ("s3_upload.max_megabytes_per_second=1e-300", "max_megabytes_per_second: 1e-300: expected at least 0.001"),
        ("guards.step_timeout_seconds=1e10", "guards.step_timeout_seconds: 10000000000.0: expected at most 31,536,000"),
        ("guards.step_timeout_seconds=1e300", "guards.step_timeout_seconds: 1e+300: expected at most 31,536,000, a y"),
        ("guards.rewind_skip_after=1000001", "guards.rewind_skip_after: 1000001: expected at most 1,000,000"),
        (
            "data_skipped_ranges=[{first: 5, end: 9223372036854775807}]",
            "data_skipped_ranges.0.end: 9223372036854775807: expected at most 1,000,000,000",
        ),
        (
            "checkpoints.checkpoints_path=~nobody-of-that-name/x",
            "this home folder is not known; ./~nobody-of-that-name/x",
        ),
        ('checkpoints.checkpoints_path="a\\0b"', "no file's name holds a NUL"),
        ("profiler={profiler_export_path: ''}", "profiler.profiler_export_path: '': expected a path"),
        ("model.model_config.num_hidden_layers=1000000000", "1000000000: expected at most 10,000"),
        ("model.model_config.hidden_size=1000000001", "1000000001: expected at most 1,000,000,000"),
        ("model.model_config.num_attention_heads=4611686018427387904", "expected at most 1,000,000,000"),
        (
            "tokens.global_batch_size=4611686018427387904",
            "tokens.global_batch_size: 4611686018427387904: expected at most",
        ),
        ("parallelism.dp=4611686018427387904", "parallelism.dp: 4611686018427387904: expected at most"),
        ("data_stages.0.data.dataset.dataset_weights=[1e308,1e308,1e308]", "and a finite sum"),
        (f"optimizer.weight_decay_exclude_named_params=['{'(' * 5000}']", "expected a regular expression"),
        ("optimizer.weight_decay_exclude_named_params=['a{99999999999999}']", "expected a regular expression"),
        ("nonsense", "--set nonsense: expected key.sub=value"),
        ("=3", "--set =3: expected key.sub=value"),
        ("data_stages.9.name=x", "'9': expected an index from 0 to 2"),
        ("data_stages.name=x", "'name': expected an index from 0 to 3"),
        ("tokens.train_steps.x=1", "expected a section, not 1100"),
        ("tokens.train_steps=[", "--set tokens.train_steps=[: not valid YAML"),
        ("tokens.train_steps=5\nx: 3", r"--set tokens.train_steps=5\nx: 3: not valid YAML"),
        (f"data_stages.{'9' * 5000}=5", "expected an index from 0 to 3"),
        ("data_stages.\u0660=5", "expected an index from 0 to 3"),
        (f"model.model_config.moe_config{'.a' * 2000}=5", "expected at most 50 levels"),
    ],
)
def test_a_bad_override_is_named(override: str, expected: str) -> None:
    assert expected in message("tiny", override)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["parallelism.dp=5"], "--set parallelism.dp=5: tokens.global_batch_size: 12: "),
        (
            ["parallelism.pp=6", "parallelism.dp=5", "general.seed=1"],
            "--set parallelism.dp=5: tokens.global_batch_size: ",
        ),
        (["tokens.global_batch_size=24", "parallelism.dp=5"], "--set: tokens.global_batch_size: 24: "),
        (["parallelism.tp=2", "model.model_config.vocab_size=1025"], "--set: parallelism.tp: 2: does not divide"),
        (["tokens.batch_accumulation_per_replica=5", "parallelism.dp=5"], "--set: tokens.global_batch_size: 12: "),
        (
            ["model.model_config.vocab_size=512"],
            "--set model.model_config.vocab_size=512: tokenizer.train.vocab_size: ",
        ),
    ],
)
def test_a_file_is_not_blamed_for_an_override(overrides: list[str], where: str) -> None:
    assert message("tiny", *overrides).startswith(where)


def test_a_file_that_is_wrong_by_itself_is_blamed_whatever_is_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("hidden_size: 16", "hidden_size: 15"))
    assert message(path, "general.seed=3").startswith(f"{path}:5: model.model_config.hidden_size: 15: ")


def test_a_misspelt_source_is_named_unless_there_is_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    override = "data_stages.1.data.dataset.dataset_folder.0=prosee"
    expected = (
        "dataset_folder.0: 'prosee': expected the name of a source in corpus, or a folder of shards; did you mean"
    )
    assert message("tiny", override).endswith(f"--set: data_stages.1.data.dataset.{expected} prose?")
    load_recipe("tiny", ["data_stages.1.data.dataset.dataset_folder.0=elsewhere"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prosee").mkdir()
    load_recipe("tiny", [override])


def test_a_batch_that_is_only_a_product_has_a_limit_too() -> None:
    batch = ["tokens.global_batch_size=null", "tokens.micro_batch_size=1000000", "parallelism.dp=1000000"]
    line = message("tiny", *batch, "tokens.batch_accumulation_per_replica=1000000")
    assert "tokens.global_batch_size: 1000000000000000000: expected at most 1,000,000,000 sequences" in line


def test_the_file_the_line_and_the_nearest_key_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("hidden_size: 16", "hiden_size: 16"))
    assert message(path) == f"{path}:5: model.model_config.hiden_size: 16: unknown key; did you mean hidden_size?"


def test_a_missing_key_is_named_with_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("    hidden_size: 16\n", ""))
    assert message(path) == f"{path}:3: model.model_config.hidden_size: missing; this key has no default"


def test_an_unknown_key_far_from_all_lists_them(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "  zzz: 1\n")
    assert f"{path}:13: tokens.zzz: 1: unknown key; expected one of sequence_length, train_steps" in message(path)


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "  train_steps: 5\n")
    assert message(path) == f"{path}: not valid YAML: the key 'train_steps' stands twice in one place (line 13)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- 1\n- 2\n", "expected a recipe (sections of keys)"),
        ("tiny\n", "expected a recipe (sections of keys)"),
        ("a: [1\n", "not valid YAML"),
        ("a: \t b: c\n", "not valid YAML"),
        ("a: \x07\n", "not valid YAML"),
        ("tokens: 3\n", "missing"),
        ("a: !!int abc\n", "'abc' cannot be read as int (line 1)"),
        ("a: 1\nb: !!int ''\n", "'' cannot be read as int (line 2)"),
        ("a: !!int 0x\n", "'0x' cannot be read as int (line 1)"),
        ("a: !!float abc\n", "'abc' cannot be read as float"),
        ("a: !!bool maybe\n", "'maybe' cannot be read as bool"),
        ("a: !!timestamp junk\n", "'junk' cannot be read as timestamp (line 1)"),
        ("a: !!timestamp 2001-13-45\n", "cannot be read as timestamp"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        ("a: 9223372036854775808\n", "'9223372036854775808' is beyond 64 bits (line 1)"),
        (f"a: {'9' * 5000}\n", "9… cannot be read as int (line 1)"),
        (f"a: 0x{'f' * 5000}\n", "f… is beyond 64 bits (line 1)"),
        ('a: "\\ud800"\n', "half of a surrogate pair is no character (line 1)"),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "expected one YAML document; another begins (line 2)"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply; expected at most 50 levels"),
        ("a: &a [*a]\n", "nested too deeply"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]\n" for last, name in pairwise("abcdefghi")),
            "expected at most 100,000 values",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    assert message(path).startswith(str(path)) and expected in message(path)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in message(path)
    assert "expected a recipe file, found a folder" in message(tmp_path)


def test_a_misspelt_recipe_name_gives_the_nearest() -> None:
    assert message("tniy").endswith("did you mean tiny?")
    assert "shipped recipes: smollm3-3b, tiny" in message("/no/such/file.yaml")


def test_sequence_length_must_divide_by_tp_in_reduce_scatter_mode() -> None:
    overrides = ["parallelism.tp=2", "tokens.sequence_length=255"]
    expected = "tokens.sequence_length: 255: expected a multiple of tp 2 in tp_mode REDUCE_SCATTER"
    assert expected in message("tiny", *overrides, "parallelism.tp_mode=REDUCE_SCATTER")
    load_recipe("tiny", [*overrides, "parallelism.tp_mode=ALL_REDUCE"])


def test_two_bytes_a_token_are_measured_by_the_vocabulary_of_the_shards_where_the_recipe_has_it() -> None:
    overrides = ["model.model_config.vocab_size=70000", "data_stages.0.data.dataset.token_size_in_bytes=2"]
    with pytest.raises(UserError, match="token_size_in_bytes: 2: expected 4 for a vocab_size of 70000"):
        load_recipe("tiny", overrides)
    load_recipe("tiny", [*overrides, "data_stages.0.data.dataset.vocab_size=60000"])


def test_an_odd_vocabulary_names_the_padding_that_works() -> None:
    overrides = ["parallelism.tp=2", "model.model_config.vocab_size=1025"]
    expected = "does not divide the padded vocabulary 1025; set model.make_vocab_size_divisible_by to 2 (rows: 1026)"
    assert expected in message("tiny", *overrides)
    load_recipe("tiny", [*overrides, "model.make_vocab_size_divisible_by=2"])


def test_two_bytes_do_not_hold_a_token_of_a_large_vocabulary() -> None:
    key = "data_stages.0.data.dataset.token_size_in_bytes"
    assert f"{key}: 2: expected 4 for a vocab_size of 65537" in message(
        "tiny", f"{key}=2", "model.model_config.vocab_size=65537"
    )
    load_recipe("tiny", [f"{key}=2", "model.model_config.vocab_size=65536"])


def test_one_f_one_b_needs_micro_batches_for_its_stages() -> None:
    overrides = ["parallelism.pp=4", "tokens.micro_batch_size=6"]
    assert "parallelism.pp: 4: 1f1b needs at least pp − 1 = 3 micro-batches and gets 2" in message("tiny", *overrides)
    load_recipe("tiny", [*overrides, "parallelism.pp_engine=afab"])


def test_a_trained_tokenizer_needs_a_corpus() -> None:
    assert "expected a corpus to train it on" in message("tiny", "corpus=null")


def test_a_mapping_with_keys_that_are_not_text_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown key"):
        recipe_from_mapping({3: 4})


def test_values_are_shown_on_one_short_line() -> None:
    assert show_value("a\n" * 100) == repr("a\n" * 100)[:59] + "…"
    assert [show_value(value) for value in (None, True, "x", 1.5)] == ["null", "true", "'x'", "1.5"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('"a\\nb": 1\n', r": a\nb: 1: unknown key"),
        ('"\\e[31m": 1\n', r": \x1b[31m: 1"),
        (f"{'k' * 1000}: 1\n", "kkk…: 1:"),
    ],
)
def test_a_strange_key_is_shown_on_one_short_line(tmp_path: Path, text: str, shown: str) -> None:
    line = message(write(tmp_path, text))
    assert shown in line and line.isprintable() and len(line) < 700


@given(st.text())
def test_a_message_is_one_line_that_can_be_shown(text: str) -> None:
    for error in (UserError(text), user_error(text, source=text or "x", key=text, value=text, nearest=text)):
        assert str(error).isprintable() and len(str(error).splitlines()) <= 1


def test_the_nearest_name_is_only_a_near_one() -> None:
    assert nearest_name("hiden", ["hidden", "layers"]) == "hidden"
    assert nearest_name("xyz", ["hidden", "layers"]) is None
