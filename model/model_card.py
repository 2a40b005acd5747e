"""The README.md of an exported model: what is known of a run, as facts, and the text made from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby

from model.arithmetic import num_parameters
from model.hf_mapping import hf_class
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import stage_sequence_length, tokens_through
from nanotron_recipes.source_names import short_names


@dataclass(frozen=True)
class StageFact:
    """One data stage: the first step that draws from it, and the share of each source (sums to 1)."""

    name: str
    start_step: int
    weights: dict[str, float]


@dataclass(frozen=True)
class ValidationFact:
    """Held-out loss of one source; figures that are not known are None."""

    source: str
    nats_per_token: float
    bits_per_byte: float | None = None
    bigram_bits_per_byte: float | None = None
    """The same for a Witten-Bell bigram model of tokens that the run trained on."""


@dataclass(frozen=True)
class ArithmeticFact:
    """Held-out sums and differences answered greedily."""

    correct: int
    total: int


@dataclass(frozen=True)
class ModelCardFacts:
    """What a model card can say; an optional fact that is missing leaves its section out."""

    name: str
    hf_class: str
    num_parameters: int
    shape: dict[str, str]
    """Rows of the architecture table: label, value."""
    recipe: str | None = None
    step: int | None = None
    """Steps trained; None for weights that no step of ours has changed: imported ones, of which neither licence nor
    training is known, and those that a run begins with."""
    train_steps: int | None = None
    tokens: int | None = None
    stages: tuple[StageFact, ...] = ()
    validation: tuple[ValidationFact, ...] = ()
    arithmetic: ArithmeticFact | None = None
    has_tokenizer: bool = True
    prompt: str = "The"
    """What the example lets the model go on with."""


def facts_from_recipe(
    recipe: Recipe, *, name: str, step: int | None = None, recipe_name: str | None = None
) -> ModelCardFacts:
    """What the recipe alone tells about its model after `step` steps (None: no training of ours).

    Measured facts are added with dataclasses.replace.
    """
    architecture, tokens = recipe.model.architecture, recipe.tokens
    heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
    without = [str(layer + 1) for layer, has_rope in enumerate(architecture.rope_layers) if not has_rope]
    shape = {
        "layers": str(architecture.num_hidden_layers),
        "hidden size": str(architecture.hidden_size),
        "feed-forward size": f"{architecture.intermediate_size} (SwiGLU)",
        "attention heads": f"{heads} ({kv_heads} for keys and values)",
        "rotary base": f"{architecture.rope_theta:g}",
        "layers without rotary positions": f"{len(without)} (layer {', '.join(without)})" if without else "none",
        "query and key norm": "yes" if architecture.use_qk_norm else "no",
        "vocabulary": f"{architecture.vocab_size:,}",
        "embeddings": "tied" if architecture.tie_word_embeddings else "untied",
        "training sequence": f"{_training_lengths(recipe)} tokens",
        "weights": recipe.model.dtype,
    }
    batch = tokens.global_batch_size
    return ModelCardFacts(
        name=name,
        hf_class=hf_class(recipe),
        num_parameters=num_parameters(recipe),
        shape=shape,
        recipe=recipe_name,
        step=step,
        train_steps=tokens.train_steps if step is not None else None,
        tokens=tokens_through(recipe, step) if step is not None and batch else None,
        stages=_stages(recipe, step or 0),
    )


def _training_lengths(recipe: Recipe) -> str:
    lengths = [stage_sequence_length(recipe, stage) for stage in recipe.data_stages]
    return ", then ".join(f"{length:,}" for length, _ in groupby(lengths or [recipe.tokens.sequence_length]))


def _stages(recipe: Recipe, step: int) -> tuple[StageFact, ...]:
    stages = []
    names = short_names(folder for stage in recipe.data_stages for folder in stage.data.dataset.dataset_folder)
    for stage in recipe.data_stages:
        if stage.start_training_step > step:
            break
        dataset = stage.data.dataset
        sources = [names[folder] for folder in dataset.dataset_folder]
        weights = dataset.dataset_weights or [1.0] * len(sources)
        shares = {name: weight / sum(weights) for name, weight in zip(sources, weights, strict=True)}
        stages.append(StageFact(stage.name, stage.start_training_step, shares))
    return tuple(stages)


_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanotron-recipes
{% if trained %}- nanotron
- pretraining
{% endif %}---

# {{ facts.name }}

{% if trained -%}
A base language model of {{ "{:,}".format(facts.num_parameters) }} parameters (`{{ facts.hf_class }}`), pretrained with
nanotron-recipes{% if facts.recipe %} from the recipe `{{ facts.recipe }}`{% endif %}.
It has seen {{ "{:,}".format(facts.step) }} of {{ "{:,}".format(facts.train_steps) }} steps
{%- if facts.tokens %}, {{ "{:,}".format(facts.tokens) }} tokens{% endif %}.
It continues text and follows no instructions.
{%- else -%}
A language model of {{ "{:,}".format(facts.num_parameters) }} parameters (`{{ facts.hf_class }}`), written by
nanotron-recipes, which has not trained it.
{%- endif %}

## Architecture

| | |
|---|---|
{% for label, value in facts.shape.items() -%}
| {{ label }} | {{ value }} |
{% endfor %}
{%- if facts.stages %}
## Training data

Share of each source by stage, and the first step of the stage:

| stage | from step | sources |
|---|---:|---|
{% for stage in facts.stages -%}
| {{ stage.name }} | {{ "{:,}".format(stage.start_step) }} | {{ shares(stage) }} |
{% endfor %}
{%- endif %}
{%- if facts.validation %}
## Validation

Text held out from training, by source
{%- if bigram %}, beside a Witten-Bell bigram model of training tokens of the run{% endif %}:

| source | nats per token | bits per byte |{% if bigram %} bigram, bits per byte |{% endif %}
|---|---:|---:|{% if bigram %}---:|{% endif %}
{% for row in facts.validation -%}
| {{ row.source }} | {{ "%.3f"|format(row.nats_per_token) }} | {{ figure(row.bits_per_byte) }} |
{%- if bigram %} {{ figure(row.bigram_bits_per_byte) }} |{% endif %}
{% endfor %}
{%- endif %}
{%- if facts.arithmetic %}
## Arithmetic

Of {{ facts.arithmetic.total }} two-digit sums and differences that training never saw, {{ facts.arithmetic.correct }}
({{ "%.1f"|format(100 * facts.arithmetic.correct / facts.arithmetic.total) }} %) are answered correctly, greedily
(95 % interval {{ "%.1f"|format(100 * interval[0]) }} to {{ "%.1f"|format(100 * interval[1]) }} %).
{% endif %}
## How to load it

```python
from transformers import AutoModelForCausalLM{% if facts.has_tokenizer %}, AutoTokenizer{% endif %}

folder = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder)
{%- if facts.has_tokenizer %}
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer({{ quoted(facts.prompt) }}, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
{%- endif %}
```
"""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share, which is honest at 0 and 1 as well (Wilson 1927, J. Am. Stat. Assoc. 22)."""
    z, share = 1.96, correct / total
    centre = share + z * z / (2 * total)
    spread = z * ((share * (1 - share) + z * z / (4 * total)) / total) ** 0.5
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def render_card(facts: ModelCardFacts) -> str:
    """The model card as Markdown with its YAML front matter."""
    from jinja2 import Environment, StrictUndefined

    arithmetic = facts.arithmetic
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_TEMPLATE)
    return template.render(
        facts=facts,
        trained=facts.step is not None,
        bigram=any(row.bigram_bits_per_byte is not None for row in facts.validation),
        quoted=lambda text: json.dumps(text, ensure_ascii=False),
        figure=lambda value: "–" if value is None else f"{value:.3f}",
        shares=lambda stage: ", ".join(f"{name} {100 * share:.3g} %" for name, share in stage.weights.items()),
        interval=wilson_interval(arithmetic.correct, arithmetic.total) if arithmetic else None,
    )
