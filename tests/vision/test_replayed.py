"""Models of images by CUDA graph (core/replayed.py) against the same calls without."""

import pytest
import torch
import torch.nn.functional as F

from polymamba.core.replayed import Replayed, own_stream
from polymamba.vision import Vim, VMamba, preset_config
from polymamba.vision.inference import for_batches

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def model_of(name):
    torch.manual_seed(0)
    config = preset_config(name, num_classes=11, drop_path_rate=0.3)
    return (Vim if name == "test_vim" else VMamba)(config).cuda()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_training_steps(name, bf16):
    images, labels = torch.randn(6, 5, 3, 64, 64), torch.randint(11, (6, 5))

    def train(graphed: bool) -> dict[str, torch.Tensor]:
        model = model_of(name).train()
        parameters = list(model.parameters())

        def gradients(inputs):
            x, y = inputs
            for p in parameters:
                p.grad = None
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            return loss.detach(), [p.grad for p in parameters]

        call = Replayed(gradients, GPU) if graphed else lambda inputs: gradients([m.cuda() for m in inputs])
        torch.manual_seed(1)  # of the stochastic depth
        found = {}
        with own_stream(GPU):
            for i, batch in enumerate(zip(images, labels, strict=True)):
                loss, grads = call(list(batch))
                found[f"loss {i}"] = loss.clone()
                with torch.no_grad():
                    torch._foreach_add_(parameters, grads, alpha=-0.1)
        assert not graphed or len(call.graphs) == 1
        return found | {name: p.detach() for name, p in model.named_parameters()}

    plain, by_graph = train(False), train(True)
    for key, value in plain.items():
        assert torch.equal(value, by_graph[key]), f"{key}: {(value - by_graph[key]).abs().max()}"


@torch.no_grad()
@pytest.mark.parametrize("precision", ["autocast", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_predictions_with_a_smaller_last_batch(name, precision):
    """Weights are unlike at random: those of one direction of Vim would do for the other as they begin."""
    model = model_of(name).eval()
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = model.to(dtype)
    call = for_batches(model, model)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
        for size in (3, 3, 3, 3, 2, 3):
            x = torch.randn(size, 3, 64, 64, dtype=dtype)
            assert torch.equal(call(x), model(x.cuda()))
    assert len(call.graphs) == 1
