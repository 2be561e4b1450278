"""Shared by all tests: one thread, so that timings and sums do not depend on the machine, and quiet logs."""

from __future__ import annotations

import warnings

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in version.*")


@pytest.fixture(scope="session", autouse=True)
def quiet_diffusers() -> None:
    """Test schedulers are built from foreign configs on purpose; the warnings about it would bury real ones."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
