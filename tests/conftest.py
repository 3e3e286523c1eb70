"""For all tests: Triton's interpreter where there is no GPU, one seed, and `gpu` tests skipped without a GPU.

`in_processes` runs a function in several processes that share a gloo group.
"""

import multiprocessing
import os
import runpy
import tempfile
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch loads: see facade/cli.py
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers have the cores already

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported


def pytest_collection_modifyitems(items):
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def in_processes():
    """in_processes(n, function, ...): what each of n processes returned of `function`, which a test file holds.

    They are forked off a server that has loaded torch already: a fresh interpreter for each takes seconds.
    """
    context = multiprocessing.get_context("forkserver")
    kernels = [f"polymamba.kernels.{name}.cpu" for name in ("selective_scan", "causal_conv1d", "norm")]
    torch_s = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]
    context.set_forkserver_preload([*torch_s, "polymamba.core.language_model", "polymamba.core.train", *kernels])

    def run(n, function, *arguments, **named):
        with tempfile.TemporaryDirectory() as folder:
            work = function.__code__.co_filename, function.__name__
            jobs = [(*work, rank, n, folder, arguments, named) for rank in range(n)]
            script = str(Path(__file__).with_name("in_process.py"))
            started = [
                context.Process(target=runpy.run_path, args=(script,), kwargs={"init_globals": {"JOB": job}})
                for job in jobs
            ]
            for process in started:
                process.start()
            for process in started:
                process.join(120)
                process.kill()  # nothing, to one that has ended
            assert [process.exitcode for process in started] == [0] * n
            return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(n)]

    return run
