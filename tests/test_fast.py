"""Claims about fast.py: the outputs, gradients, weights and manners of the plain modules, from less memory."""

import copy
import importlib
import sys
from functools import partial

import pytest
import torch
from helpers import CPU, randomised, words
from test_model import outputs_and_gradients, random_loss, relative_error
from test_sparse import BF16, F16, F32, F64, MASKS, assert_near, cuda, make_images, make_mask, make_net
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from experiments.bench import memory
from fast import FastBlock, FastDepthwiseConv, speed_up
from fcmae import FCMAE, random_mask
from model import Block, ConvNeXt
from sparse import masked_stages, sparse_stages

run_dense = ConvNeXt.forward_stages
PRECISIONS = [(F32, None), (BF16, None), (F16, None), (F32, BF16), (F32, F16)]  # of weights, and under autocast
SITES = [6, 12]  # of a block with 4 channels: GRN on the activations, and folded into the weight


def make_pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The same random weights in plain modules and in fast ones, in training mode."""
    plain = randomised(module).train()
    return plain, speed_up(copy.deepcopy(plain))


def run_sparse(net, imgs, kind="equal"):
    return [stage.features for stage in sparse_stages(net, imgs, make_mask(kind))]


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize(("version", "again"), [(1, False), (2, False), (2, True)])
def test_outputs_and_gradients_equal_those_of_the_plain_modules(version, again, kind):
    nets, run = make_pair(make_net(version)), partial(run_sparse, kind=kind) if kind else run_dense
    nets[1].checkpoint_activations(again)
    assert_near(*(outputs_and_gradients(run, net, make_images(net)) for net in nets))


@pytest.mark.parametrize("run", [run_dense, run_sparse])
@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS, ids=str)
def test_lower_precision_is_as_near_to_float64_as_the_plain_modules(dtype, autocast, run):
    plain, fast = make_pair(make_net())
    imgs, eps = make_images(plain), torch.finfo(autocast or dtype).eps
    exact = outputs_and_gradients(run, plain, imgs)
    results = [outputs_and_gradients(run, net.to(dtype), imgs.to(dtype), autocast) for net in (plain, fast)]
    for e, p, f in zip(exact, *results):
        assert f.dtype == p.dtype and relative_error(f.double(), e) < 4 * relative_error(p.double(), e) + 4 * eps


@cuda
@pytest.mark.parametrize("run", [run_dense, run_sparse])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-3), (BF16, 0.1), (F16, 0.03)])
def test_cuda_outputs_and_gradients_equal_the_plain_modules_on_the_cpu(dtype, tolerance, run):
    plain, fast = make_pair(make_net())
    imgs = make_images(plain)
    exact = outputs_and_gradients(run, plain, imgs)
    results = outputs_and_gradients(run, fast.to("cuda", dtype), imgs.to("cuda", dtype))
    vectors = [torch.cat([t.flatten().cpu().double() for t in tensors]) for tensors in (results, exact)]
    assert relative_error(*vectors) < tolerance


def make_mlps(dtype=F64, approximate="none", bias=True) -> tuple[Block, Block]:
    """Blocks whose `mlp` is GELU, GRN and the second linear layer alone: (N, H, W, 16) -> (N, H, W, 4)."""
    torch.manual_seed(0)
    block = Block(4).to(dtype)
    block.norm = block.pwconv1 = nn.Identity()
    block.act, block.pwconv2 = nn.GELU(approximate), nn.Linear(16, 4, bias, dtype=dtype)
    return make_pair(block)


def mlp_and_gradients(block, h, scale=1):
    leaf = h.clone().requires_grad_()
    y = block.mlp(leaf)
    parameters = [*block.grn.parameters(), *block.pwconv2.parameters()]
    return [y, *torch.autograd.grad(scale * random_loss([y]), [leaf, *parameters])]


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("options", [{}, dict(approximate="tanh"), dict(bias=False)], ids=str)
@pytest.mark.parametrize("values", ["random", "dead channels", "zero"])
def test_the_fused_layers_equal_the_modules(values, options, sites):
    h = torch.randn(2, 3, sites // 3, 16, dtype=F64)
    if values == "zero":
        h.zero_()
    elif values == "dead channels":
        h[..., 0], h[..., 1], h[0, ..., 2] = 0, -60, 0
    for expected, tensor in zip(*(mlp_and_gradients(block, h) for block in make_mlps(**options))):
        torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize(("first", "rest", "scale"), [(300, 300, 1), (6e-6, 1, 1000)], ids=["large", "nearly dead"])
def test_float16_does_not_overflow(first, rest, scale, sites):
    """Nor do a sum of large squares, or what multiplies the gradient of a nearly dead channel's norm."""
    h = torch.randn(1, 1, sites, 16) * torch.tensor([first] + [rest] * 15)
    (plain, _), (_, fast) = make_mlps(), make_mlps(F32)
    fast.load_state_dict(plain.state_dict())
    expected = mlp_and_gradients(plain, h.half().double(), scale)
    for tensor, exact in zip(mlp_and_gradients(fast, h.half(), scale), expected):
        assert tensor.isfinite().all() and relative_error(tensor.double(), exact) < 0.02


@pytest.mark.parametrize(("part", "shape"), [("mlp", (2, 3, 2, 16)), ("mlp", (2, 3, 4, 16)), ("dwconv", (2, 4, 5, 6))])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_backward_keeps_the_types_of_forward(dtype, part, shape):
    """Forward under autocast; backward under none, or under another that is none of its business."""
    (_, fast), results = make_mlps(F32), []
    x, parameters = torch.randn(shape).to(dtype), list((fast.grn if part == "mlp" else fast.dwconv).parameters())
    for ambient in (None, BF16, F16):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = getattr(fast, part)(leaf)
        assert y.dtype == dtype
        with torch.autocast("cpu", ambient, enabled=ambient is not None):
            results.append(torch.autograd.grad(random_loss([y]), [leaf, *parameters]))
        assert [grad.dtype for grad in results[-1]] == [dtype] + [F32] * 2
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("part", ["dwconv", "norm", "pwconv1", "act", "grn", "pwconv2"])
@pytest.mark.parametrize("run", [run_dense, run_sparse])
def test_every_hook_is_called_in_training(run, part):
    (_, fast), calls = make_pair(make_net()), []
    for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        register = getattr(getattr(fast.stages[0][0], part), f"register_{kind}_hook")
        hook = register(lambda *_, kind=kind: calls.append(kind))
        random_loss(run(fast, make_images(fast))).backward()
        hook.remove()
        assert calls.pop() == kind and not calls


@pytest.mark.parametrize("run", [run_dense, run_sparse])
@pytest.mark.parametrize("part", ["dwconv", "act", "grn", "pwconv2"])
def test_subclassed_modules_are_used_in_training(part, run):
    """So are other types, such as ReLU, or what parametrisation and adapters put there."""
    nets = make_pair(make_net())
    for module in (getattr(block, part) for net in nets for block in net.stages[2]):
        kind = type(module)
        module.__class__ = type("Halved", (kind,), dict(forward=lambda self, x, kind=kind: kind.forward(self, x) / 2))
    assert_near(*(outputs_and_gradients(run, net, make_images(net)) for net in nets))


@pytest.mark.parametrize("run", [run_dense, run_sparse, lambda net, imgs: masked_stages(net, imgs, make_mask("equal"))])
def test_nothing_changes_in_evaluation(run):
    """Outputs and gradients to the bit, and derivatives of derivatives, which the fast modules refuse in training."""
    nets = [net.float() for net in make_pair(make_net())]
    imgs = make_images(nets[0]).float()

    def second_derivatives(net):
        net.zero_grad()
        (grad,) = torch.autograd.grad(random_loss(run(net, imgs)), [net.stages[0][0].pwconv1.weight], create_graph=True)
        grad.square().sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(*(run(net, imgs) for net in nets)))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        second_derivatives(nets[1])
    results = [outputs_and_gradients(run, net.eval(), imgs) + second_derivatives(net) for net in nets]
    assert len(results[0]) == len(results[1]) and all(torch.equal(a, b) for a, b in zip(*results))


def test_names_of_weights_stay_and_speeding_up_twice_is_once():
    plain, fast = make_pair(FCMAE(make_net().float(), decoder_embed_dim=8))
    assert list(fast.state_dict()) == list(plain.state_dict()) and speed_up(fast) is fast
    blocks = [module for module in fast.modules() if isinstance(module, Block)]
    assert {(type(block), type(block.dwconv)) for block in blocks} == {(FastBlock, FastDepthwiseConv)}
    x, blocks = torch.randn(2, 8, 4, 4, requires_grad=True), [net.encoder.stages[0][0] for net in (plain, fast)]
    assert len({type(block.dwconv(x).grad_fn) for block in blocks}) == 2  # in training


@pytest.mark.parametrize("run", [run_dense, run_sparse])
def test_less_is_kept_for_backward(run):
    """Of a block's MLP one wide tensor in place of three; of sparse convolutions rows alone."""
    plain, fast = make_pair(make_net())
    imgs = make_images(plain)
    weights = sum(p.nbytes for p in plain.parameters()) / 2**20
    kept = [memory(lambda net=net: random_loss(run(net, imgs)), CPU) - weights for net in (plain, fast)]
    assert kept[1] < (0.7 if run is run_dense else 0.6) * kept[0]


@pytest.mark.slow  # the compiler builds its kernels for a minute
@pytest.mark.parametrize("which", [0, 1], ids=["plain", "fast"])
def test_compiled_training_equals_eager_in_few_graphs(which):
    encoder = ConvNeXt((1, 1, 1, 1), (8, 8, 16, 16), num_classes=0, stem_stride=1)
    mae, compiler = make_pair(FCMAE(encoder, decoder_embed_dim=8))[which], CompileCounterWithBackend("inductor")
    imgs, mask, results = torch.randn(2, 3, 32, 32), random_mask(2, 4, 4, 0.6), []
    for call in (mae, torch.compile(mae, backend=compiler)):
        loss, _, _ = call(imgs, mask)
        gradients = torch.autograd.grad(loss, mae.parameters())
        results.append(torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)]))
    assert relative_error(results[1], results[0]) < 1e-3
    assert 0 < compiler.frame_count <= 3  # before the tables of sites, which depend on the mask's values, and after


@pytest.mark.parametrize("stage", ["pretrain FCMAE", "finetune ConvNeXt", "detect MaskRCNN", "segment UPerNet"])
def test_every_script_speeds_up_its_network(stage, tmp_path, monkeypatch):
    name, network = stage.split()
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "speed_up", lambda net: sys.exit(type(net).__name__))
    with pytest.raises(SystemExit, match=network):
        script.main(script.get_args(words(device="cpu", embedded_images=(50, 50), output_dir=tmp_path)))
