"""CUDA C++ compiled at run time by NVRTC, which comes with PyTorch: no compiler and no CUDA toolkit on the machine.

`kernel(...)` compiles a source for the current device, once: what NVRTC made is kept in the user's cache folder
($XDG_CACHE_HOME/polymamba, ~/.cache/polymamba) under a hash of all that it depends on. A `Kernel` is launched on
PyTorch's current stream and may be captured in a CUDA graph. Where anything of this is missing or fails, `Unavailable`
says what; the caller has another kernel.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import struct
import sys
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

EMULATED = False  # for tests: kernels are run on the CPU instead
_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_PERCENT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT


class Unavailable(RuntimeError):
    """No NVRTC, no driver, or a source that NVRTC refuses."""


def _cuda_major() -> str:
    return (torch.version.cuda or "").split(".")[0]


@cache
def library_path() -> str | None:
    """NVRTC's file among PyTorch's packages; its bare name where the system's loader is to find it; None without CUDA.

    Nothing is loaded: this only looks.
    """
    major = _cuda_major()
    if not major:
        return None
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    roots.append(Path(torch.__file__).parent / "lib")
    for root in roots:
        for folder in (root, root / f"cu{major}" / "lib", root / "cuda_nvrtc" / "lib", root / f"cu{major}" / "bin"):
            if (folder / name).exists():
                return str(folder / name)
    return name


@cache
def _nvrtc() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise Unavailable("this PyTorch is built without CUDA")
    try:
        # NVRTC looks for this one by name only.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(path)
    except OSError as error:
        raise Unavailable(f"NVRTC cannot be loaded: {error}") from None
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


@cache
def processors(device: int) -> int:
    """Multiprocessors of a CUDA device: how many blocks fill it."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def loads() -> bool:
    """Whether NVRTC is there and loads."""
    try:
        _nvrtc()
    except Unavailable:
        return False
    return True


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"the CUDA driver cannot be loaded: {error}") from None


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise Unavailable(f"{what}: {(text.value or b'error').decode()} ({code})")


def compile_source(source: str, architecture: str) -> bytes:
    """Machine code for an architecture such as sm_90. Needs no GPU. Raises Unavailable with NVRTC's messages."""
    nvrtc = _nvrtc()

    def check(code: int) -> None:
        if code:
            raise Unavailable(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")

    def read(get_size, get) -> bytes:
        size = ctypes.c_size_t()
        check(get_size(program, ctypes.byref(size)))
        room = ctypes.create_string_buffer(size.value)
        check(get(program, room))
        return room.raw

    # Fused multiply-adds stand where they are spelled out, so that no plan's registers decide about a rounding.
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"--fmad=false"]
    program = ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"polymamba.cu", 0, None, None))
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            log = read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode()
            raise Unavailable(f"NVRTC does not compile for {architecture}: {log}")
        return read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cache_folder() -> Path:
    """Where machine code is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "polymamba"


def _compile_or_recall(source: str, architecture: str) -> bytes:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    key = f"{major.value}.{minor.value} {architecture} no fmad {source}"
    try:
        path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
        if path.exists():
            return path.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return compile_source(source, architecture)
    code = compile_source(source, architecture)
    beside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(code)
        beside.replace(path)
    except OSError:  # nowhere to keep it: compile again next time
        with contextlib.suppress(OSError):
            beside.unlink()
    return code


def tensor_map(matrix: Tensor, n_rows: int, n_columns: int) -> bytes:
    """What a kernel needs to bring tiles (n_rows, n_columns) of a bf16 matrix to shared memory: 128 bytes.

    n_columns 64: a tile's rows of 128 bytes are swizzled, as wgmma reads them. What lies outside is zeros.
    """
    (height, width), address = matrix.shape, matrix.data_ptr()
    if EMULATED:
        return struct.pack("5q88x", address, height, width, n_rows, n_columns)
    room = ctypes.create_string_buffer(128 + 64)
    place = (ctypes.addressof(room) + 63) // 64 * 64
    step = matrix.stride(0) if height > 1 else width  # of one row it may be anything
    sizes, stride = (ctypes.c_uint64 * 2)(width, height), (ctypes.c_uint64 * 1)(2 * step)
    box, steps = (ctypes.c_uint32 * 2)(n_columns, n_rows), (ctypes.c_uint32 * 2)(1, 1)
    bf16, plain, swizzle_128, promote_256, zeros = 9, 0, 3, 3, 0
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place), bf16, 2, ctypes.c_void_p(address), sizes, stride, box, steps,
        plain, swizzle_128, promote_256, zeros,
    )  # fmt: skip
    _check(code, "making a tensor map")
    return ctypes.string_at(place, 128)


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_int * 17))  # the value begins 8 bytes from the start


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("n_attributes", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_EARLY = _LaunchAttribute(6, (ctypes.c_int * 17)(0, 1))


class Kernel:
    """A function on one device, with the dynamic shared memory that its source says (an int `shared_bytes`).

    A source may also say, by an int `shared_percent`, how much shared memory a multiprocessor is to have while it runs,
    of the most that it can (it gets what it needs at least); the rest is the L1 cache. Left alone, the driver chooses.
    A kernel that may begin before the last one has ended cannot, on a multiprocessor that has to be divided anew.
    """

    def __init__(self, code: bytes, name: str):
        driver = _driver()
        _make_context_current()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), f"finding {name}")

        def constant(which: bytes) -> int | None:
            if which not in code:  # among its symbols: the driver is not asked for what there is not
                return None
            address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int(0)
            found = driver.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, which)
            _check(found, f"asking what {name} says")
            _check(driver.cuMemcpyDtoH_v2(ctypes.byref(value), address, ctypes.c_size_t(4)), f"reading about {name}")
            return value.value

        shared, percent = constant(b"shared_bytes"), constant(b"shared_percent")
        if shared is None:
            raise Unavailable(f"the source of {name} does not say how much shared memory it takes")
        self.shared = shared
        self._launch, self._device = driver.cuLaunchKernel, torch.cuda.current_device()
        if self.shared > 48 * 1024:
            _check(
                driver.cuFuncSetAttribute(self._function, _SHARED_MEMORY, self.shared),
                f"{self.shared} bytes of shared memory for {name}",
            )
        if percent is not None:  # a wish: it may be refused
            driver.cuFuncSetAttribute(self._function, _SHARED_PERCENT, percent)

    def __call__(self, blocks: int, threads: int, argument: bytes, *, early: bool = False) -> None:
        """Launch with one argument, a struct given as its bytes, on the current stream of the kernel's device.

        That device is the current one. early: before what was launched last has ended; the kernel waits for that
        itself (griddepcontrol: Hopper GPUs and later).
        """
        if not blocks:
            return
        _make_context_current()
        pointers = (ctypes.c_char_p * 1)(argument)
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        if early:
            config = _LaunchConfig(blocks, 1, 1, threads, 1, 1, self.shared, stream, ctypes.pointer(_EARLY), 1)
            code = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        else:
            code = self._launch(self._function, blocks, 1, 1, threads, 1, 1, self.shared, stream, pointers, None)
        if code:
            raise RuntimeError(f"launching a CUDA kernel failed with code {code}")

    def clusters_at_once(self, threads: int, blocks: int) -> int:
        """How many clusters of so many blocks the device runs at once. Raises Unavailable if it runs none."""
        n, attribute = ctypes.c_int(), _LaunchAttribute(4, (ctypes.c_int * 17)(0, blocks, 1, 1))  # CLUSTER_DIMENSION
        config = _LaunchConfig(blocks, 1, 1, threads, 1, 1, self.shared, None, ctypes.pointer(attribute), 1)
        found = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(n), self._function, ctypes.byref(config))
        _check(found, "asking how many clusters run at once")
        if not n.value:
            raise Unavailable(f"the device runs no cluster of {blocks} blocks")
        return n.value


_thread = threading.local()


def _make_context_current() -> None:
    """PyTorch's context of the current device, once a thread: one that autograd started may have none yet."""
    if getattr(_thread, "ready", False):
        return
    torch.cuda.init()
    driver, context = _driver(), ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "asking for the context")
    if not context:
        device = ctypes.c_int()
        _check(driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()), "finding the device")
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "making a context")
        _check(driver.cuCtxSetCurrent(context), "making the context current")
    _thread.ready = True


@cache
def kernel(source: str, name: str, device: int) -> Kernel:
    """The function `name` of a source on a device, which is the current one. Raises Unavailable."""
    major, minor = torch.cuda.get_device_capability(device)
    own = "a" if (major, minor) == (9, 0) else ""  # with what only this GPU has
    return Kernel(_compile_or_recall(source, f"sm_{major}{minor}{own}"), name)
