"""Import nanotron 0.4, which cannot be imported as published.

``nanotron.logging`` imports ``LoggingArgs`` from ``nanotron.config.config``, which needs ``nanotron.logging.log_rank``:
whichever of nanotron's modules is imported first fails with a circular import. ``LoggingArgs`` is used there as an
annotation only, so ``nanotron.logging`` is imported once while placeholders stand in for the two configuration modules.

Every module of ours that needs nanotron calls `import_nanotron` before its first ``from nanotron ...`` line.
"""

import sys
import warnings
from types import ModuleType

NANOTRON_VERSION = "0.4"
"""The one release that the adaptations in this folder were written for and are tested with."""

_CYCLE = ("nanotron.config", "nanotron.config.config")


def import_nanotron() -> None:
    """Make ``import nanotron.<anything without flash-attn>`` work; a second call does nothing.

    Raises:
        ImportError: nanotron is missing or is another release than `NANOTRON_VERSION`.
    """
    if "nanotron.logging" in sys.modules:
        return
    import nanotron

    if nanotron.__version__ != NANOTRON_VERSION:
        raise ImportError(
            f"nanotron {nanotron.__version__} is installed; the adaptations in parallel/ are for {NANOTRON_VERSION}: "
            f"pip install nanotron=={NANOTRON_VERSION}"
        )
    _break_import_cycle()
    _silence_collectives()


def _silence_collectives() -> None:
    """nanotron calls two collectives by names that torch 2.13 warns about; newer names are unknown to older torch. And
    its barriers are on the current device, which is set before the process group is made, as torch asks for."""
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context", UserWarning)


def _break_import_cycle() -> None:
    for name in _CYCLE:
        placeholder = ModuleType(name)
        placeholder.LoggingArgs = type("LoggingArgs", (), {})  # type: ignore[attr-defined]
        sys.modules[name] = placeholder
    try:
        import nanotron.logging
    finally:
        import nanotron

        for name in _CYCLE:
            del sys.modules[name]
        vars(nanotron).pop("config", None)
    import nanotron.config
