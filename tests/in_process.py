"""What one of several test processes does: conftest's `in_processes` runs this file in each, with JOB set."""

import os
import runpy
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

file, function, rank, n, folder, arguments, named = JOB  # noqa: F821 - of runpy  # pyright: ignore[reportUndefinedVariable]

# What a launcher says, and Accelerate reads.
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
torch.set_num_threads(1)
torch.manual_seed(0)
rendezvous = f"file://{folder}/rendezvous"
dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=n, timeout=timedelta(seconds=60))
result = runpy.run_path(file, run_name="in_process")[function](*arguments, **named)
torch.save(result, Path(folder) / f"{rank}.pt")
if dist.is_initialized():  # training ends with that
    dist.barrier()
    dist.destroy_process_group()
