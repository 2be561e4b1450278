"""The kill test of a whole run (`kill_run.py`): fifty SIGKILLs, then equal to the run that nobody stopped."""

import subprocess
import sys

import kill_run
import pytest


def resumes() -> bool:
    said = subprocess.run([sys.executable, "-m", "rewardtune", "train", "--help"], capture_output=True, text=True)
    return "--resume" in said.stdout


@pytest.mark.slow  # fifty starts of the command: about a quarter of an hour on two cores
def test_a_run_killed_fifty_times_equals_the_one_that_was_not(tmp_path):
    if not resumes():
        pytest.skip("`rewardtune train` has no --resume yet")
    assert kill_run.run(tmp_path, kills=50) == []
