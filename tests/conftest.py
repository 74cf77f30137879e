"""Tests marked `gpu` are skipped on a machine without one; `slow` ones are left out of `make test-fast`."""

import signal
from types import CodeType

import pytest
import torch

PROCESSES = {"spawn", "forked", "start", "subprocess"}  # what starts ranks or programs
WHOLE_RUN = {"main", "ok"}  # `main(settings).ok()`: from data to score; what looks at `base_run()` shares one such run
SLOW_FILES = {"test_audit.py", "test_broken.py", "test_nodes.py", "test_sweep.py"}
# Sweeps through Triton's interpreter and other long ones, by the beginning of their names.
SLOW_TESTS = {
    "test_kernels.py": ("test_kernels_through_the_interpreter", "test_every_kernel_compiles"),
    "test_bench.py": ("test_scaling", "test_startup"),
    "test_contributing.py": ("test_a_new_",),
    "test_compare.py": ("test_a_difference", "test_another_base", "test_a_revision"),
    "test_ngram.py": ("test_probabilities_sum", "test_the_mixture", "test_later_tokens"),
    "test_data.py": ("test_damaged_data",),
}
# Of these, cases that stay: the core of their section.
CORE = ("[exact-tilt]", "[no BOS at the start of training]")


def names_in(code: CodeType) -> set[str]:
    """Names that a function uses, those of the functions inside it too."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def is_slow(item) -> bool:
    """By file, by name, or because it starts processes or a whole run."""
    file, names = item.path.name, names_in(item.function.__code__)
    if item.name.endswith(CORE):
        return False
    if file in SLOW_FILES or item.originalname.startswith(SLOW_TESTS.get(file, ())):
        return True
    return bool(PROCESSES & names) or names >= WHOLE_RUN


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if is_slow(item):
            item.add_marker("slow")


# A job that a script starts with & ignores SIGINT, and so would every process of these tests; some are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
