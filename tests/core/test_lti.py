"""The linear time-invariant mixers: S4D against the official code, both against their recurrences, in stacks."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from polymamba.core import S4, S4D, Backbone, BackboneConfig, load_state, save_state
from polymamba.core.lti import Dense, Diagonal
from polymamba.core.optim import learning_rate, parameter_groups
from polymamba.core.s4 import hippo_legs, plain_C

GOLDEN = Path(__file__).parents[1] / "golden"
OUR_NAME = {"output_linear.0.weight": "out_proj.weight", "output_linear.0.bias": "out_proj.bias"}
MIXERS = {
    "s4d": lambda: S4D(6, 10),
    "s4d-real": lambda: S4D(6, 5, is_complex=False),
    "s4": lambda: S4(6, 10),
}
LENGTHS = (19, 7, 1, 0)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 5e-6):
    assert a.shape == b.shape
    if a.numel():
        error = (a - b).abs().max()
        assert error <= tolerance * b.detach().abs().max().clamp(min=1.0), f"{error:.2e}"


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(0)
    mixer = MIXERS[request.param]()
    for parameter in mixer.parameters():  # no parameter at a trivial value
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def golden_s4d(dtype) -> tuple[S4D, dict]:
    config = json.loads((GOLDEN / "s4d" / "config.json").read_text())
    mixer = S4D(config["d_model"], config["d_state"])
    weights = load_file(GOLDEN / "s4d" / "weights.safetensors")
    ours = {OUR_NAME.get(k, k.removeprefix("kernel.")): v for k, v in weights.items()}
    ours["out_proj.weight"] = ours["out_proj.weight"].squeeze(-1)  # a convolution of width 1
    mixer.load_state_dict(ours)
    return mixer.to(dtype), load_file(GOLDEN / "s4d" / "io.safetensors")


@pytest.mark.parametrize(("dtype", "prefix", "tolerance"), [(torch.float32, "", 2e-5), (torch.float64, "64", 1e-11)])
def test_s4d_is_the_official_one(dtype, prefix, tolerance):
    mixer, io = golden_s4d(dtype)
    x = io["input"].mT.to(dtype)
    y = mixer(x)
    close(y.mT, io[f"out{prefix}.y"], tolerance)
    close(mixer(x[:, :31]).mT, io[f"out{prefix}.y_short"], tolerance)
    y.pow(2).mean().backward()
    gradients = {k.removeprefix(f"grad{prefix}."): v for k, v in io.items() if k.startswith(f"grad{prefix}.")}
    assert len(gradients) == 6
    for name, gradient in gradients.items():
        ours = mixer.get_parameter(OUR_NAME.get(name, name.removeprefix("kernel."))).grad
        error = (ours - gradient.squeeze(-1) if name in OUR_NAME else ours - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max(), f"{name}: {error:.2e}"


def test_systems_are_their_formulas():
    """Each discrete system from its continuous one, by dense matrices in float64."""
    for mixer in (S4D(3, 8).double(), S4(3, 8).double()):
        A, B, C = mixer.system()
        for h in range(3):
            dt = (mixer.log_dt if isinstance(mixer, S4D) else mixer.inv_dt)[h].exp()
            if isinstance(mixer, S4D):
                eigenvalues = torch.complex(-mixer.log_A_real[h].exp(), mixer.A_imag[h])
                continuous, drive = torch.diag(torch.cat((eigenvalues, eigenvalues.conj()))), torch.ones(8)
                discrete = torch.matrix_exp(dt * continuous)
                drive = torch.linalg.solve(continuous, (discrete - torch.eye(8)) @ drive.to(torch.complex128))
            else:
                P, B_h = (torch.view_as_complex(x[h]) for x in (mixer.P, mixer.B))
                P, B_h = torch.cat((P, P.conj())), torch.cat((B_h, B_h.conj()))
                eigenvalues = torch.complex(-mixer.A_real[h].exp(), -mixer.A_imag[h])
                continuous = torch.diag(torch.cat((eigenvalues, eigenvalues.conj()))) - torch.outer(P, P.conj())
                inverse = torch.linalg.inv(torch.eye(8) - dt / 2 * continuous)
                discrete, drive = inverse @ (torch.eye(8) + dt / 2 * continuous), inverse @ (dt * B_h)
            C_h = torch.view_as_complex(mixer.C[h])
            kernel, x = [], drive
            for _ in range(20):
                kernel.append(2 * (C_h @ x[:4]).real)
                x = discrete @ x
            ours, x = [], B[:, None]
            for _ in range(20):
                ours.append((C * x[:, 0])[h].sum())
                x = A(x)
            close(torch.stack(ours), torch.stack(kernel), 1e-10)


def test_s4_begins_as_hippo():
    """Diagonal plus rank one, the matrix is HiPPO-LegS up to a change of basis: its eigenvalues are -1 to -N."""
    eigenvalues, P, _ = hippo_legs(8)
    whole, P = torch.cat((eigenvalues, eigenvalues.conj())), torch.cat((P, P.conj()))
    found = torch.linalg.eigvals(torch.diag(whole) - torch.outer(P, P.conj()))
    close(found.real.sort().values, -torch.arange(8, 0, -1).double(), 1e-9)
    close(found.imag, torch.zeros(8).double(), 1e-9)


@pytest.mark.parametrize("length", [1, 6, 12])
def test_plain_C_undoes_what_the_official_code_learns(length):
    torch.manual_seed(0)
    layer = S4(3, 8)
    A = copy.deepcopy(layer).double().system().A.matrix
    C = torch.view_as_complex(layer.C.detach().double())
    row = torch.cat((C.real, -C.imag), -1)[:, None]
    learnt = (row - row @ torch.linalg.matrix_power(A, length))[:, 0].detach()
    learnt = torch.stack((learnt[:, :4], -learnt[:, 4:]), -1)
    close(plain_C(layer, learnt.float(), length), layer.C.detach(), 1e-4)
    assert torch.equal(plain_C(layer, layer.C, 0), layer.C)


@pytest.mark.parametrize("length", [1, 2, 3, 97, 128, 130])
def test_convolution_is_the_recurrence(mixer, length):
    mixer, x = mixer.double(), torch.randn(2, length, 6, dtype=torch.float64)
    y, after = mixer(x, return_state=True)
    state = mixer.init_state(2)
    close(torch.stack([mixer.step(x[:, t], state) for t in range(length)], 1), y.detach(), 1e-12)
    close(after.ssm.detach(), state.ssm, 1e-12)
    close(mixer(x), y, 1e-12)


def test_convolution_is_the_recurrence_over_a_long_sequence(mixer):
    """In float32, past the memory of most states: both forms use the same powers of A."""
    x = torch.randn(1, 5000, 6)
    y, after = mixer(x, return_state=True)
    state = mixer.init_state(1)
    close(torch.stack([mixer.step(x[:, t], state) for t in range(5000)], 1), y.detach(), 2e-4)
    close(after.ssm.detach(), state.ssm, 2e-4)


def test_gradients(mixer):
    mixer, x = mixer.double(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    before = mixer.init_state(2)
    before.ssm.normal_().requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x, ssm, *parameters):
        named = dict(zip(names, parameters, strict=True))
        y, after = torch.func.functional_call(mixer, named, (x, type(before)(ssm)), {"return_state": True})
        return y, after.ssm

    assert torch.autograd.gradcheck(run, (x, before.ssm, *parameters), fast_mode=True)


def test_weights_that_change_are_seen_by_the_next_step(mixer):
    state, x = mixer.init_state(1), torch.randn(1, 6)
    mixer.step(x, state)
    with torch.no_grad():
        mixer.C.mul_(2)
    fresh = copy.deepcopy(mixer)
    fresh._kept = None
    close(mixer.step(x, mixer.init_state(1)), fresh.step(x, mixer.init_state(1)), 0)


def test_transitions_square_and_transpose():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8)
    for A in (
        Diagonal(torch.randn(3, 4, dtype=torch.complex64)),
        Diagonal(torch.randn(3, 8)),
        Dense(torch.randn(3, 8, 8)),
    ):
        close(A.squared()(x), A(A(x)), 1e-5)
        y = torch.randn(3, 2, 8)
        close((A(x) * y).sum(-1), (x * A.transposed()(y)).sum(-1), 1e-5)


PATTERNS = [("s4d",), ("s4", "mlp"), ("mamba", "s4d", "attention")]


def backbone(pattern, n_layer: int = 3) -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig(
        d_model=12, n_layer=n_layer, pattern=pattern, d_state=5, s4_state=6, norm="layer", mlp_bias=True
    )
    model = Backbone(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(pattern, side):
    model, x = backbone(pattern), torch.randn(4, 19, 12)
    places, rows = torch.arange(19), torch.tensor(LENGTHS)[:, None]
    mask = places < rows if side == "right" else places >= 19 - rows
    _, before = model(torch.randn(4, 3, 12), return_state=True)
    y, state = model(x.masked_fill(~mask[..., None], 1e3), before, padding_mask=mask, return_state=True)
    for row in range(4):
        start = [type(s)(*(t[row : row + 1] for t in s)) for s in before]
        if LENGTHS[row] == 0:
            after = start
        else:
            alone, after = model(x[row : row + 1, mask[row]], start, return_state=True)
            close(y[row, mask[row]], alone[0])
        token = torch.randn(1, 12)
        ours = [type(s)(*(t[row : row + 1].clone() for t in s)) for s in state]
        theirs = [type(s)(*(t.clone() for t in s)) for s in after]
        close(model.step(token, ours), model.step(token, theirs))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_pieces_steps_and_causality(pattern):
    model, x = backbone(pattern), torch.randn(1, 30, 12)
    ends = [0, 11, 11, 12, 30]
    packed, states = model(x, cu_seqlens=torch.tensor(ends, dtype=torch.int32), return_state=True)
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        alone, after = model(x[:, start:end], return_state=True)
        close(packed[:, start:end], alone)
        for ours, theirs in zip(states, after, strict=True):
            if hasattr(ours, "ssm"):
                close(ours.ssm[i : i + 1], theirs.ssm)
    whole = model(x)
    first, state = model(x[:, :7], return_state=True)
    second, state = model(x[:, 7:20], state, return_state=True)
    rest = [model.step(x[:, t], state) for t in range(20, 30)]
    close(torch.cat((first, second, torch.stack(rest, 1)), 1), whole)
    changed = x.clone()
    changed[:, 17:] += 1
    close(model(changed)[:, :17], whole[:, :17], 1e-6)


def test_compiles_in_one_graph():
    torch.compiler.reset()
    model, x = backbone(("s4d", "s4"), n_layer=2), torch.randn(2, 19, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.arange(19) < torch.tensor([19, 4])[:, None]
    close(compiled(x, padding_mask=mask), model(x, padding_mask=mask))
    compiled(x)[..., :5].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_keeps_the_systems_in_float32():
    model, x = backbone(("s4d",)), torch.randn(1, 300, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    close(y, model(x), 0.05)


def test_states_are_saved_and_read(tmp_path):
    from polymamba.core import LanguageModel, LanguageModelConfig

    config = BackboneConfig(d_model=12, n_layer=2, pattern=("s4d", "s4"), s4_state=6)
    model = LanguageModel(LanguageModelConfig(backbone=config, vocab_size=11)).eval()
    tokens = torch.randint(11, (1, 9))
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
        save_state(tmp_path / "state", state)
        again = load_state(tmp_path / "state", model)
        assert torch.equal(model.step(tokens[:, 0], again), model.step(tokens[:, 0], state))


def test_dynamics_learn_slowly_and_are_not_decayed():
    model = backbone(("s4", "s4d", "mlp"))
    decayed, free, slow = parameter_groups(model, 0.3)
    names = {id(p): name.removeprefix("layers.") for name, p in model.named_parameters()}
    assert {names[id(p)] for p in slow["params"]} == {
        *(f"0.mixer.{name}" for name in ("inv_dt", "A_real", "A_imag", "P", "B")),
        *(f"1.mixer.{name}" for name in ("log_dt", "log_A_real", "A_imag")),
    }
    assert sum(len(group["params"]) for group in (decayed, free, slow)) == len(names)
    assert slow["weight_decay"] == 0
    assert (learning_rate(slow, 2e-3, 0.5), learning_rate(slow, 4e-4, 0.5)) == (5e-4, 2e-4)
    assert learning_rate(free, 2e-3, 0.5) == 1e-3


def test_odd_complex_states_are_refused():
    for pattern in (("s4",), ("s4d",)):
        with pytest.raises(ValueError, match="s4_state is 5; complex states need an even number"):
            BackboneConfig(d_model=8, n_layer=1, pattern=pattern, s4_state=5)
    BackboneConfig(d_model=8, n_layer=1, pattern=("s4d",), s4_state=5, s4d_complex=False)


def test_mlp_with_biases_is_its_formula():
    model = backbone(("mlp",)).double()
    mlp, x = model.layers[0].mixer, torch.randn(2, 12, dtype=torch.float64)
    gate, up = F.linear(x, mlp.in_proj.weight, mlp.in_proj.bias).chunk(2, -1)
    close(mlp(x), (F.silu(gate) * up) @ mlp.out_proj.weight.T + mlp.out_proj.bias, 1e-13)
