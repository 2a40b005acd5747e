"""What is legal but worth knowing is noted."""

import pytest

from nanotron_recipes.loading import load_recipe

QK_NORM = "model.model_config.use_qk_norm=true"


def test_recomputation_with_asynchronous_communication_is_noted() -> None:
    asynchronous = ["parallelism.tp=2", "parallelism.tp_linear_async_communication=true"]
    recompute = "parallelism.recompute=selective"
    noted = [
        any("run twice" in note for note in load_recipe("tiny", words).notes)
        for words in ([*asynchronous, recompute], asynchronous, ["parallelism.tp=2", recompute])
    ]
    assert noted == [True, False, False]


def test_qk_norm_with_layers_without_rope_is_noted_as_not_exportable() -> None:
    assert any("cannot" in note or "not exported" in note for note in load_recipe("tiny", [QK_NORM]).notes)
    with_rope = load_recipe("tiny", [QK_NORM, "model.model_config.no_rope_layer=null"])
    assert with_rope.notes == []


@pytest.mark.parametrize(
    "override",
    [
        "parallelism.context_parallel_size=2",
        "parallelism.expert_parallel_size=2",
        "model.model_config.attention_bias=true",
        "model.model_config.moe_config={num_experts: 4}",
        "model.model_config.sliding_window_size=64",
        "model.model_config.rope_scaling={factor: 2.0}",
        "model.model_config.rope_interleaved=true",
    ],
)
def test_what_is_not_available_yet_validates_with_a_note(override: str) -> None:
    assert [note for note in load_recipe("tiny", [override]).notes if "is not available yet" in note] != []
