"""A Mamba block's step in Triton: products row by row for a few sequences, by the matrix units for more."""

import torch

from . import triton_few, triton_many

FEW = 4096  # sequences times model width up to which a product is done row by row


def step(x, stream, conv_state, ssm_state, weights, eps, centred):
    weights = type(weights)(*(None if t is None else t.contiguous() for t in weights))
    with torch.cuda.device_of(x):
        run = triton_few.step if x.numel() <= FEW else triton_many.step
        return run(x, stream, conv_state, ssm_state, weights, eps, centred)
