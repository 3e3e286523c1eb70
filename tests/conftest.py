"""For all tests: Triton's interpreter where there is no GPU, one seed, and `gpu` tests skipped without a GPU.

`in_processes` runs a function in several processes that share a gloo group. `emulated` runs a CUDA kernel on the CPU.
Under `full_disk` no file grows beyond a limit.
"""

import contextlib
import ctypes
import functools
import hashlib
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
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

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a script starts behind `&`; some tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `python -m pytest` puts this project's folder there, and transformers, which asks for a package named `kernels`, would
# then import ours once more under that name: its operators would take the place of those that the tests patch.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parents[1]]


def pytest_collection_modifyitems(items):
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _drafts():
    """Pictures are drawn small and not laid out: else they are a third of the time of a command that trains a little.

    Those of `in_full` are drawn as a user gets them.
    """
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    @functools.wraps(savefig)
    def draft(self, path, **options):
        self.set_layout_engine("none")
        savefig(self, path, **{**options, "dpi": 20, "bbox_inches": None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", draft)
        yield


@pytest.fixture
def in_full(monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", Figure.savefig.__wrapped__)


@pytest.fixture(scope="session")
def full_disk():
    """`with full_disk(limit)`: files grow no longer than so many bytes: a full disk but for the error's number."""

    @contextlib.contextmanager
    def limited(limit: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal that comes with it
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


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


_EMULATOR = Path(__file__).parent / "kernels"  # emulator.h, emulator_main.h


@pytest.fixture(scope="session")
def emulation():
    """(a CUDA source) -> C++ for the CPU."""

    def of(source: str) -> str:
        macros, rest = source.split("// What only a GPU has", 1)
        return f'#include "{_EMULATOR}/emulator.h"\n{macros}{rest[rest.index("// Numbers of 16 and 32 bits") :]}\n'

    return of


@pytest.fixture(scope="session")
def emulated(emulation, tmp_path_factory):
    """(a CUDA source, the name of its kernel) -> a function of the same arguments as nvrtc.Kernel's, on the CPU."""
    if shutil.which("g++") is None or HAS_GPU:
        pytest.skip("needs g++, and no GPU, where the kernels themselves are tested")
    folder = tmp_path_factory.mktemp("emulated")

    def made(source: str, name: str):
        text = emulation(source) + f'#define KERNEL {name}\n#include "{_EMULATOR}/emulator_main.h"\n'
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            path.with_suffix(".cpp").write_text(text)
            options = ["-std=c++17", "-O0", "-w", "-fPIC", "-shared", "-ffp-contract=off"]
            options += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # where a GPU faults, this stops
            subprocess.run(["g++", *options, str(path.with_suffix(".cpp")), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))

        def launch(blocks: int, threads: int, argument: bytes, *, early: bool = False) -> None:
            if blocks:
                library.launch(argument, ctypes.c_int64(blocks), threads)

        return launch

    return made
