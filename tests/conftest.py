"""Tests marked `gpu` are skipped on a machine without one; `slow` ones are left out of `make test-fast`."""

import signal
from types import CodeType

import pytest
import torch

PROCESSES = {"spawn", "forked", "start", "subprocess"}  # what starts ranks or programs
WHOLE_RUN = {"main", "ok"}  # `main(settings).ok()`: from data to score; what looks at `base_run()` shares one such run
# Tools, faults of environments and files, and what runs whole audits, sweeps or broken copies of the script.
SLOW_FILES = {
    f"test_{name}.py"
    for name in "anatomy audit broken compare environment hostile lease nodes ppm_mix report runs sample submission "
    "sweep".split()
}
# Long tests, by the beginning of their names; most go on to vary something that a shorter one has shown.
SLOW_TESTS = {
    "test_kernels.py": ("test_kernels_through_the_interpreter", "test_every_kernel_compiles"),
    "test_bench.py": ("test_scaling", "test_startup", "test_step_lines"),
    "test_contributing.py": ("test_a_new_",),
    "test_ngram.py": ("test_probabilities_sum", "test_the_mixture", "test_later_tokens"),
    "test_data.py": ("test_damaged_data", "test_too_few", "test_training_shards_that", "test_a_check_reads"),
    "test_prepare_data.py": ("test_stdlib", "test_paths_outside", "test_output_does_not", "test_error_in_a_worker"),
    "test_training.py": ("test_a_diverging_loss",),
    "test_joins.py": ("test_data_of_another_form",),
    "test_optim.py": ("test_warm_up_restores",),
    "test_packer.py": ("test_the_packed", "test_the_artifact_alone", "test_stripping", "test_the_running"),
    "test_quantizer.py": ("test_row_gradients", "test_calibration_reads"),
    "test_scoring.py": ("test_scores_equal_one_window",),
    "test_ttt.py": (
        "test_a_rerun",
        "test_probabilities_sum",
        "test_scored_segments",
        "test_the_shapes_of_a_gpu",
        "test_batch_size",
        "test_replayed_graphs",
        "test_documents_learn",
        "test_zero_adapters",
        "test_a_masked_kind",
        "test_base_weights",
        "test_sgd_lets",
        "test_timing",
        "test_the_optimizer_of",
    ),
}
# Of these, cases that stay: the core of their section.
CORE = (
    "test_probabilities_sum_to_one[exact-adapted]",
    "test_zero_adapters_give_the_base_models_scores[exact-1]",
    "test_documents_learn_as_one_alone_would[exact]",
    "test_the_shapes_of_a_gpu_give_the_same_scores[0-cached]",
    "test_base_weights_learn_by_sgd[{}]",
    "test_scores_equal_one_window_at_a_time[0]",
    "test_a_masked_kind_is_gone[q]",
    "[exact-tilt]",
    "[no BOS at the start of training]",
)


def names_in(code: CodeType) -> set[str]:
    """Names that a function uses, those of the functions inside it too."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def is_slow(item) -> bool:
    """By file, by name, or because it or a fixture of its own file starts processes or a whole run."""
    file = item.path.name
    if item.name.endswith(CORE):
        return False
    if file in SLOW_FILES or item.originalname.startswith(SLOW_TESTS.get(file, ())):
        return True
    fixtures = (fixture[-1].func for fixture in item._fixtureinfo.name2fixturedefs.values())
    of_tests = [fixture for fixture in fixtures if fixture.__module__ == item.module.__name__]
    names = set().union(*(names_in(function.__code__) for function in [item.function, *of_tests]))
    return bool(PROCESSES & names) or names >= WHOLE_RUN


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if is_slow(item):
            item.add_marker("slow")


# A job that a script starts with & ignores SIGINT, and so would every process of these tests; some are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
