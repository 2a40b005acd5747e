"""nanotron 0.4 can be imported."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import parallel.nanotron_import
from parallel.nanotron_import import import_nanotron

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_nanotron_is_imported_in_a_new_process() -> None:
    result = python(
        "from parallel.nanotron_import import import_nanotron\n"
        "import_nanotron(); import_nanotron()\n"
        "import nanotron.parallel.pipeline_parallel.engine, nanotron.config.config\n"
        "from nanotron.config import LoggingArgs\n"
        "assert LoggingArgs.__module__ == 'nanotron.config.config' and LoggingArgs.__dataclass_fields__\n"
    )
    assert result.returncode == 0, result.stderr


def test_the_wheel_by_itself_cannot_be_imported() -> None:
    """The day this fails the placeholders can go."""
    result = python("import nanotron.config")
    assert result.returncode != 0 and "LoggingArgs" in result.stderr


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.nanotron_import, "NANOTRON_VERSION", "0.5")
    monkeypatch.delitem(sys.modules, "nanotron.logging", raising=False)
    with pytest.raises(ImportError, match=r"nanotron 0\.4 is installed.*for 0\.5"):
        import_nanotron()


def test_only_the_two_renamed_collectives_and_barriers_on_the_current_device_are_silenced() -> None:
    barrier = (
        "barrier(): using the device under current context. "
        "You can specify `device_id` in `init_process_group` to mute this warning."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        parallel.nanotron_import._silence_collectives()
        with warnings.catch_warnings(record=True) as shown:
            for name in ("reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce"):
                message = f"`torch.distributed.{name}` is deprecated. Please use another."
                warnings.warn(message, FutureWarning, stacklevel=1)
            warnings.warn("`torch.distributed.reduce_scatter_tensor` is deprecated.", UserWarning, stacklevel=1)
            warnings.warn(barrier, UserWarning, stacklevel=1)
            warnings.warn("barrier(): the group is gone", UserWarning, stacklevel=1)
    assert [(warning.category, str(warning.message).split()[0]) for warning in shown] == [
        (FutureWarning, "`torch.distributed.all_reduce`"),
        (UserWarning, "`torch.distributed.reduce_scatter_tensor`"),
        (UserWarning, "barrier():"),
    ]
