"""A run whose recipe has its sources elsewhere: staged first, and refused where a copy was changed since."""

import os
from pathlib import Path

from small_pretraining import StartProcess, pretrain_command


def test_pretrain_stages_first_and_never_trains_on_a_copy_that_was_changed(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    arguments = [small_file, "--run", "staged", "--set", f"data_staging.path={tmp_path}/nvme", "--stop-after", "2"]
    code, out, err = start_process(pretrain_command(*arguments), tmp_path).end()
    assert code == 0, err
    assert "not staged yet" in out and "staged: 8 files of " in out and "stopped after step 2" in out
    (copy,) = (path for path in (tmp_path / "nvme").rglob("words/*.ds"))
    found, content = copy.stat(), bytearray(copy.read_bytes())
    content[1000] ^= 1
    with copy.open("r+b") as file:
        file.write(content)
    os.utime(copy, ns=(found.st_atime_ns, found.st_mtime_ns))
    code, out, err = start_process(pretrain_command(*arguments[:-1], "4"), tmp_path).end()
    assert code == 2 and "starting" not in out
    assert err == (
        f"error: {copy}: changed since it was staged (time of change of status); run `nanotron-recipes data stage "
        "RECIPE`, which hashes it again\n"
    )
