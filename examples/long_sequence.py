"""A DNA model trained on one long sequence, of which each GPU holds a piece; weights are divided among them as well.

torchrun --nproc-per-node 4 examples/long_sequence.py 2097152
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from polymamba import core
from polymamba.core.parallel import context_parallel
from polymamba.core.sharded import clip_gradients, shard

LENGTH = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(DEVICE, (world,), mesh_dim_names=("context",))

torch.manual_seed(0)  # the same weights everywhere
backbone = core.BackboneConfig(d_model=64, n_layer=4)
model = core.LanguageModel(core.LanguageModelConfig(backbone=backbone, vocab_size=16)).to(DEVICE)
model.backbone.gradient_checkpointing = True
shard(model, mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# This process's piece of a repeating pattern, and the token after it.
start, stop = rank * LENGTH // world, (rank + 1) * LENGTH // world
places = torch.arange(start, stop + 1, device=DEVICE)
tokens = ((places * places) // 3 % 4)[None]

for step in range(20):
    with context_parallel(mesh["context"]), torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[0, 1:])
    loss.backward()
    clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    if rank == 0 and step % 5 == 4:
        print(f"step {step + 1}  loss {mean.item():.3f}", flush=True)

model.save_pretrained(os.environ.get("OUTPUT", "runs/long"))  # all processes call it, the first one writes
dist.destroy_process_group()
