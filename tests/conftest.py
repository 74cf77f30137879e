"""Tests marked `gpu` are skipped on a machine without one; `slow` ones are left out of `make test-fast`."""

import signal
from types import CodeType

import pytest
import torch

PROCESSES = {"spawn", "forked", "start", "Popen"}  # helpers that start ranks or whole runs in processes of their own
SLOW_FILES = {"test_audit.py", "test_broken.py", "test_nodes.py", "test_contributing.py"}
# Whole runs, interpreter sweeps and others that take a second or more, by the beginning of their names.
SLOW_TESTS: dict[str, tuple[str, ...]] = {}


def names_in(code: CodeType) -> set[str]:
    """Names that a function uses, those of the functions inside it too."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def is_slow(item) -> bool:
    """By file, by name, or because it starts processes."""
    return (
        item.path.name in SLOW_FILES
        or item.originalname.startswith(SLOW_TESTS.get(item.path.name, ()))
        or bool(PROCESSES & names_in(item.function.__code__))
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if is_slow(item):
            item.add_marker("slow")


# A job that a script starts with & ignores SIGINT, and so would every process of these tests; some are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
