"""The recipes and topologies that must train the same.

A variant changes what is trained, so each has a reference of its own at one rank; an overlay (topology, micro-batch,
padding …) must not change anything.
"""

from dataclasses import dataclass

VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "untied": ("model.model_config.tie_word_embeddings=false",),
    "qk-norm": ("model.model_config.use_qk_norm=true",),
    "z-loss": ("model.model_config.z_loss_enabled=true", "model.model_config.z_loss_coefficient=1.0e-2"),
    "no document masks": ("model.model_config._use_doc_masking=false",),
    "everything": (
        "model.model_config.tie_word_embeddings=false",
        "model.model_config.use_qk_norm=true",
        "model.model_config.z_loss_enabled=true",
        "model.model_config.vocab_size=509",
        "model.model_config.no_rope_layer=2",
    ),
    # 0.7M parameters in buckets of 1 MiB, which are reduced while the backward pass goes on. Wider, therefore with a
    # lower rate: at 1e-2 training becomes unstable after step 12, and rounding grows tenfold every other step.
    "several buckets": (
        "model.model_config.hidden_size=192",
        "model.ddp_bucket_cap_mb=1",
        "model.init_method.std=0.05",
        "optimizer.learning_rate_scheduler.learning_rate=3.0e-3",
    ),
}


@dataclass(frozen=True)
class Case:
    """A run that must agree with the reference of its variant."""

    variant: str
    overlay: tuple[str, ...]
    num_steps: int = 20

    @property
    def has_copies(self) -> bool:
        """Whether some parameter is on several ranks: not in a pipeline alone, unless it ties its ends."""
        keys = {override.split("=")[0] for override in self.overlay}
        is_tied = "model.model_config.tie_word_embeddings=false" not in VARIANTS[self.variant]
        return bool(keys & {"parallelism.dp", "parallelism.tp"}) or (is_tied and "parallelism.pp" in keys)

    def __str__(self) -> str:
        return " ".join((self.variant, *(short(override) for override in self.overlay)))


def short(override: str) -> str:
    return override.split(".", 1)[1]


def grid(
    dp: int = 1, pp: int = 1, tp: int = 1, *, mode: str = "", engine: str = "", zero: int = 0, micro_batch: int = 4
) -> tuple[str, ...]:
    """The overrides of a topology; what is at its default is left out."""
    wanted = {
        "parallelism.dp": (dp, 1),
        "parallelism.pp": (pp, 1),
        "parallelism.tp": (tp, 1),
        "parallelism.tp_mode": (mode, ""),
        "parallelism.pp_engine": (engine, ""),
        "optimizer.zero_stage": (zero, 0),
        "tokens.micro_batch_size": (micro_batch, 4),
    }
    return tuple(f"{key}={value}" for key, (value, default) in wanted.items() if value != default)


ASYNC = "parallelism.tp_linear_async_communication=true"
PADDING = "model.make_vocab_size_divisible_by"

SELECTION = [
    Case("base", grid(micro_batch=1)),
    Case("base", grid(micro_batch=2)),
    Case("base", grid(dp=2)),
    Case("base", grid(dp=3, zero=1)),
    Case("base", grid(pp=2, engine="afab")),
    Case("base", grid(pp=4)),
    Case("base", grid(tp=2)),
    Case("base", grid(tp=2, mode="ALL_REDUCE")),
    Case("base", grid(dp=2, pp=2, tp=2, zero=1)),
    Case("base", (*grid(tp=2), ASYNC), 4),
    Case("base", (*grid(tp=2), f"{PADDING}=1020"), 4),
    Case("base", (f"{PADDING}=2",), 4),
    Case("untied", grid(pp=2, tp=2, mode="ALL_REDUCE"), 4),
    Case("qk-norm", grid(tp=2, mode="ALL_REDUCE"), 8),
    Case("z-loss", grid(pp=2, tp=2), 4),
    Case("no document masks", grid(dp=2, pp=2, zero=1), 20),
    Case("everything", grid(dp=2, pp=2, tp=2), 4),
    Case("several buckets", grid(dp=2, pp=2, zero=1), 8),
]
"""One case of every distributed behaviour; part of `make test`."""


def _topologies() -> list[tuple[str, ...]]:
    """Every grid of at most eight ranks with dp 1-3, pp 1-4, tp 1-2, and what can be chosen at each."""
    found = []
    for dp in (1, 2, 3):
        for pp in (1, 2, 3, 4):
            for tp in (1, 2):
                if dp * pp * tp > 8:
                    continue
                found += [
                    grid(dp, pp, tp, mode=mode, engine=engine, zero=zero)
                    for mode in (("", "ALL_REDUCE") if tp > 1 else ("",))
                    for engine in (("", "afab") if pp > 1 else ("",))
                    for zero in ((0, 1) if dp > 1 else (0,))
                ]
    return found


MATRIX = [
    *(Case("base", topology) for topology in _topologies()),
    *(
        Case("base", grid(dp, pp, tp, zero=zero, micro_batch=micro_batch))
        for micro_batch in (1, 2)
        for dp, pp, tp, zero in ((1, 1, 1, 0), (2, 1, 1, 0), (3, 1, 1, 1), (1, 1, 2, 0), (1, 4, 1, 0), (2, 2, 2, 1))
    ),
    *(
        Case(variant, topology)
        for variant in VARIANTS
        if variant != "base"
        for topology in (
            grid(dp=3, zero=1),
            grid(tp=2),
            grid(tp=2, mode="ALL_REDUCE"),
            grid(pp=4),
            grid(pp=2, tp=2, mode="ALL_REDUCE", engine="afab"),
            grid(dp=2, pp=2, tp=2),
            grid(dp=2, pp=2, tp=2, mode="ALL_REDUCE", zero=1),
        )
    ),
    *(Case("base", (*topology, ASYNC)) for topology in (grid(tp=2), grid(dp=2, pp=2, tp=2))),
    *(Case("base", (*grid(tp=2), f"{PADDING}={multiple}")) for multiple in (2, 100, 1020)),
]
"""The whole matrix; part of `make test-long`."""
