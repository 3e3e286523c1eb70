"""The report of a mixture of experts' routing against counting by hand."""

import csv

import numpy as np
import pytest
import torch

from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig, MoEConfig
from polymamba.core.routing import LayerRouting, Routing, recorded_routing, write_routing
from polymamba.core.routing_plot import plot_routing

pytestmark = pytest.mark.usefixtures("in_full")


def language_model(pattern=("mamba", "moe"), top_k=2, n_layer=4) -> LanguageModel:
    torch.manual_seed(0)
    moe = MoEConfig(n_experts=5, top_k=top_k, d_expert=8)
    backbone = BackboneConfig(d_model=16, n_layer=n_layer, d_state=4, pattern=pattern, moe=moe)
    return LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=11)).eval()


def routing_of(counts) -> LayerRouting:
    counts = np.array(counts)
    return LayerRouting(layer=0, counts=counts, probability=np.full(counts.shape[1], 0.5), router_entropy=1.0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [("mamba", "moe"), ("mamba+moe",)])
def test_counts_forwards_pieces_and_steps(pattern):
    model, tokens = language_model(pattern), torch.randint(11, (2, 9))
    layers = [
        i for i, block in enumerate(model.backbone.layers) if any("router" in n for n, _ in block.named_parameters())
    ]
    said = {layer: [] for layer in layers}
    for layer in layers:
        router = next(m for n, m in model.backbone.layers[layer].named_modules() if n.endswith("router"))
        router.register_forward_hook(lambda *args, layer=layer: said[layer].append(args[-1]))
    with recorded_routing(model) as routing:
        _, state = model(tokens, return_state=True)
        for t in range(3):
            model.step(tokens[:, t], state)
    model(tokens)  # no longer recorded
    ids = torch.cat((tokens.flatten(), *tokens[:, :3].T))
    assert [layer.layer for layer in routing.layers] == layers
    for layer in routing.layers:
        routes = said[layer.layer][:4]
        experts, p = (torch.cat([getattr(r, name) for r in routes]) for name in ("experts", "probabilities"))
        expected = np.zeros((11, 5), dtype=np.int64)
        for token, chosen in zip(ids.tolist(), experts.tolist(), strict=True):
            for expert in chosen:
                expected[token, expert] += 1
        np.testing.assert_array_equal(layer.counts, expected)
        np.testing.assert_allclose(layer.probability, p.mean(0), rtol=1e-5)
        entropy = torch.distributions.Categorical(p).entropy().mean().item() / np.log(2)
        assert layer.router_entropy == pytest.approx(entropy, rel=1e-5)


def test_figures():
    by_token = routing_of([[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]])
    assert by_token.load_entropy == by_token.explained == 2
    by_chance = routing_of([[2, 2, 2, 2], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert (by_chance.load_entropy, by_chance.explained) == (2, 0)
    uneven = routing_of([[6, 2], [0, 0]])
    assert uneven.load_entropy == pytest.approx(0.811278)
    assert uneven.summary()["least_used"] == 0.5
    assert uneven.summary()["most_used"] == 1.5
    nothing = routing_of([[0, 0]])
    assert (nothing.load_entropy, nothing.explained) == (0, 0)


def test_tables(tmp_path):
    layers = [routing_of([[3, 1], [0, 0], [0, 4]])]
    write_routing(tmp_path / "experts.tsv", tmp_path / "tokens.tsv", layers, lambda token: f"<{token}>")
    experts, tokens = (
        list(csv.DictReader((tmp_path / f"{name}.tsv").open(), delimiter="\t")) for name in ("experts", "tokens")
    )
    assert [(row["tokens"], row["share"], row["times_even_share"], row["most_of"]) for row in experts] == [
        ("3", "0.37500", "0.750", "<0>:1.00"),
        ("5", "0.62500", "1.250", "<2>:0.80 <0>:0.20"),
    ]
    assert [(row["id"], row["token"], row["count"], row["entropy"], row["expert_1"]) for row in tokens] == [
        ("0", "<0>", "4", "0.811", "0.2500"),
        ("2", "<2>", "4", "0.000", "1.0000"),
    ]


def test_nothing_to_record():
    model = language_model(("mamba",))
    with recorded_routing(model) as routing:
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert routing.layers == []


@pytest.mark.parametrize("n_layer", [2, 20])
def test_picture(tmp_path, n_layer):
    model = language_model(n_layer=n_layer)
    with recorded_routing(model) as routing:
        model(torch.randint(3, (1, 9)))
    plot_routing(tmp_path / "routing.png", routing.layers, lambda token: "$" * token)
    assert (tmp_path / "routing.png").stat().st_size > 1000


def test_hooks_are_gone_after_an_error():
    model = language_model()
    with pytest.raises(ZeroDivisionError), recorded_routing(model):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())
    assert isinstance(Routing(model).layers, list)
