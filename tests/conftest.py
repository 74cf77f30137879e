"""Tests marked `gpu` are skipped on a machine without one."""

import signal

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


# A job that a script starts with & ignores SIGINT, and so would every process of these tests; some of them are about
# Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
