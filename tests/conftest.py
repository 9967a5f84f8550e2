"""What all tests share: one thread, no network, tiny models."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored, and tests send it
settings.register_profile("kdstore", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=25)
settings.load_profile("kdstore")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run in an empty folder: relative default paths (store/..., runs/...) land there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
