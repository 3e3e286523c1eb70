"""Training on 1, 2, 4, ... GPUs of one host: data parallel, FSDP2, sequences in pieces, experts spread.

    torchrun --nproc-per-node 4 benchmarks/scaling.py [--only links|context|lm|experts|vision ...] [--output FILE]

Each number of GPUs is a group of the processes that torchrun started; the others wait meanwhile. A step is forward,
loss, backward and AdamW, bf16 by autocast, of random data that lies on the GPU; a time is the median of ROUNDS of
IN_A_ROW steps, as they follow one another in training, after WARM. Weak: each GPU has the same work at every number of
GPUs; strong: all share the work of one, where it says so in batches whose gradients are added up. Recorded: forward
and backward by CUDA graph, as by `train --cuda-graph`. "of n": the rate, over n times that of one GPU. Memory is what
PyTorch has reserved at the peak, on the GPU with most.

About two and a half minutes on four H200s, and one more where no kernel is compiled yet. --seconds divides what there
is among the parts: one whose time is over, or that fails, says so, and the next one begins. The file is written anew
after each line. --tiny tries the script on CPUs (gloo).
"""

import argparse
import math
import warnings
from pathlib import Path

from scaling_parts.bench import Bench
from scaling_parts.data_parallel import images, language_models
from scaling_parts.experts import experts
from scaling_parts.links import links
from scaling_parts.pieces import pieces
from scaling_parts.sizes import FULL, TINY

PARTS = {"links": links, "context": pieces, "lm": language_models, "experts": experts, "vision": images}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of VMamba, in DDP
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    bench = Bench(TINY if args.tiny else FULL, args.output, args.seconds)
    for i, name in enumerate(args.only):
        bench.part(name, PARTS[name], left=len(args.only) - i)
    bench.close()
