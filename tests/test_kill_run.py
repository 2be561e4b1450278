"""The kill test of a whole run (`kill_run.py`): fifty SIGKILLs, then equal to the run that nobody stopped."""

import kill_run
import pytest


@pytest.mark.slow  # fifty starts of the command: about a quarter of an hour on two cores
def test_a_run_killed_fifty_times_equals_the_one_that_was_not(tmp_path):
    assert kill_run.run(tmp_path, kills=50) == []
