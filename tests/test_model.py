"""Claims about model.py."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY, randomised

from fast import DepthwiseConv, gelu_grn_linear
from model import GRN, MODELS, SIZES, Block, ConvNeXt
from weights import from_native

# Paper App. A.1 and the released checkpoints: parameters with 1000 classes.
PARAMETERS = {
    "convnextv2_atto": 3_708_400,
    "convnextv2_femto": 5_233_240,
    "convnextv2_pico": 9_066_280,
    "convnextv2_nano": 15_623_800,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_base": 88_717_800,
    "convnextv2_large": 197_956_840,
    "convnextv2_huge": 660_289_640,
    "convnext_tiny": 28_589_128,  # ConvNeXt V1, as torchvision counts it
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_equal_the_published_ones(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in MODELS[name]().parameters()) == PARAMETERS[name]


def test_the_registry_holds_the_papers_sizes_and_one_of_our_own():
    assert sorted(MODELS) == [
        "convnext_atto", "convnext_base", "convnext_femto", "convnext_large", "convnext_nano", "convnext_pico", "convnext_tiny",
        "convnext_yocto", "convnextv2_atto", "convnextv2_base", "convnextv2_femto", "convnextv2_huge", "convnextv2_large", "convnextv2_nano",
        "convnextv2_pico", "convnextv2_tiny", "convnextv2_yocto",
    ]  # fmt: skip


def test_grn_is_algorithm_1_of_the_paper():
    x, grn = torch.randn(3, 5, 4, 6, dtype=torch.float64), randomised(GRN(6).double())
    expected = torch.empty_like(x)
    for n in range(3):
        norms = [sum(x[n, i, j, c] ** 2 for i in range(5) for j in range(4)) ** 0.5 for c in range(6)]
        for c in range(6):
            response = norms[c] / (sum(norms) / 6 + 1e-6)
            gamma, beta = grn.gamma[0, 0, 0, c], grn.beta[0, 0, 0, c]
            expected[n, :, :, c] = gamma * x[n, :, :, c] * response + beta + x[n, :, :, c]
    torch.testing.assert_close(grn(x), expected, rtol=1e-12, atol=1e-12)


class _GeluGRNLinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.grn, self.linear = GRN(6), torch.nn.Linear(6, 4)

    def forward(self, h, fused=True):
        return gelu_grn_linear(torch.nn.GELU(), self.grn, self.linear, h) if fused else self.linear(self.grn(F.gelu(h)))


@pytest.mark.parametrize("width", [2, 4])  # 6 and 12 sites for 4 outputs: GRN on the activations, and folded into the weight
def test_gelu_grn_and_linear_layer_equal_the_modules_and_finite_differences(width):
    layers = randomised(_GeluGRNLinear().double())
    h = torch.randn(2, 3, width, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layers(h), layers(h, fused=False))
    names, parameters = zip(*((name, p.detach().clone().requires_grad_()) for name, p in layers.named_parameters()))

    def by_parameters(h, *parameters):
        return torch.func.functional_call(layers, dict(zip(names, parameters)), (h,))

    assert torch.autograd.gradcheck(by_parameters, (h, *parameters))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_grn_and_linear_layer_keep_the_types_of_forward_in_backward(dtype, width):
    """Forward under autocast; backward under none, or under another that is none of its business."""
    layers, h, gradients = randomised(_GeluGRNLinear()), torch.randn(2, 3, width, 6).to(dtype), []
    for ambient in (None, torch.bfloat16, torch.float16):
        layers.zero_grad()
        leaf = h.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = layers(leaf)
        assert y.dtype == dtype
        with torch.autocast("cpu", ambient, enabled=ambient is not None):
            y.backward(torch.ones_like(y))
        gradients.append([leaf.grad, *(p.grad for p in layers.parameters())])
        assert [g.dtype for g in gradients[-1]] == [dtype] + [torch.float32] * 4
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))


@pytest.mark.parametrize("autocast", [False, True])
def test_depthwise_convolution_equals_conv2d_and_its_gradients(autocast):
    torch.manual_seed(0)
    ours, theirs = DepthwiseConv(8), torch.nn.Conv2d(8, 8, 7, padding=3, groups=8).double()
    theirs.load_state_dict(ours.state_dict())
    x, gradient = torch.randn(3, 8, 5, 9).contiguous(memory_format=torch.channels_last), torch.randn(3, 8, 5, 9)
    results = []
    for conv, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        image = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and conv is ours):
            y = conv(image)
        y.backward(gradient.to(y.dtype))
        assert conv is theirs or y.dtype == (torch.bfloat16 if autocast else torch.float32)
        results.append([t.double() for t in (y, image.grad, conv.weight.grad, conv.bias.grad)])
    for a, b in zip(*results):
        assert relative_error(a, b) < (1e-2 if autocast else 1e-5)


def test_a_training_step_equals_that_of_the_plain_modules():
    """The fused and exchanged backward passes, against autograd through Conv2d, GELU and GRN in float64."""
    net = randomised(ConvNeXt(**TINY, num_classes=5, stem_stride=1)).train()
    plain = ConvNeXt(**TINY, num_classes=5, stem_stride=1).double().eval()  # eval: modules; float64: PyTorch's own convolution
    plain.load_state_dict(net.state_dict())
    imgs = torch.randn(2, 3, 24, 16)
    for model in (net, plain):
        model(imgs.to(model.head.weight.dtype)).square().sum().backward()
    for (name, a), b in zip(net.named_parameters(), plain.parameters()):
        assert relative_error(a.grad.double(), b.grad) < 1e-4, name


@pytest.mark.parametrize("part", ["act", "grn", "pwconv2"])
def test_a_hooked_or_exchanged_module_is_called_in_training_too(part):
    block, calls = Block(8), []
    module = getattr(block, part)
    module.register_forward_hook(lambda *_: calls.append("hook"))
    block(torch.randn(2, 8, 4, 4))
    setattr(block, part, torch.nn.Sequential(copy.deepcopy(module), torch.nn.Identity()))
    block(torch.randn(2, 8, 4, 4)).sum().backward()
    assert calls == ["hook"] * 2


@pytest.mark.parametrize(("part", "module"), [("act", torch.nn.GELU("tanh")), ("pwconv2", torch.nn.Linear(32, 8, bias=False))])
def test_another_gelu_or_a_layer_without_bias_is_taken_in_training_too(part, module):
    block, x = Block(8), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    setattr(block, part, module)
    block.double()
    trained = block.train()(x)
    trained.sum().backward()
    torch.testing.assert_close(trained, block.eval()(x))


def test_grn_starts_as_the_identity():
    x = torch.randn(2, 3, 3, 8)
    assert torch.equal(GRN(8)(x), x)


def test_grn_does_not_overflow_in_half_precision():
    x = torch.full((1, 8, 8, 4), 200.0)  # the sum of squares is 2.56e6, beyond float16's 65504
    grn = randomised(GRN(4))
    with torch.autocast("cpu", torch.float16):
        y = grn(x.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), grn(x), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "name", [f"{v}_{s}" for v in ("convnextv2", "convnext") for s in ("yocto", "atto", "femto", "pico", "nano", "tiny")]
)
def test_logits_equal_timms_with_the_same_weights(name):
    ours = randomised(MODELS[name](num_classes=10)).eval()
    v2 = name.startswith("convnextv2")
    depths, dims = SIZES[name.split("_")[1]]
    # Built from the sizes, because timm's small V1 models differ from the paper's family in their stem and LayerScale.
    theirs = timm.models.ConvNeXt(
        depths=depths, dims=dims, num_classes=10, use_grn=v2, ls_init_value=None if v2 else 1e-6, conv_mlp=dims[0] < 96
    ).eval()  # fmt: skip
    theirs.load_state_dict(from_native(ours.state_dict(), "timm"))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5


def test_timms_own_v2_configuration_is_ours():
    theirs = timm.create_model("convnextv2_atto", num_classes=10).eval()
    ours = randomised(MODELS["convnextv2_atto"](num_classes=10)).eval()
    theirs.load_state_dict(from_native(ours.state_dict(), "timm"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("stem_stride", [4, 2, 1])
def test_stages_halve_the_resolution_for_every_stem_and_rectangle(stem_stride):
    net = ConvNeXt(**TINY, stem_stride=stem_stride, in_chans=2, num_classes=5)
    assert net.patch_size == 8 * stem_stride
    h, w = 2 * net.patch_size, 3 * net.patch_size
    imgs = torch.randn(2, 2, h, w)
    shapes = [tuple(m.shape) for m in net.forward_stages(imgs)]
    assert shapes == [(2, TINY["dims"][i], h // stem_stride >> i, w // stem_stride >> i) for i in range(4)]
    assert net.forward_features(imgs).shape == (2, 64) and net(imgs).shape == (2, 5)


def test_without_classes_there_is_neither_norm_nor_head():
    net = ConvNeXt(**TINY, num_classes=0)
    assert not [key for key in net.state_dict() if key.startswith(("norm", "head"))]
    imgs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(imgs), net.forward_stages(imgs)[-1].mean(dim=(2, 3)))


def test_state_dict_keys_are_the_authors():
    v2, v1 = (ConvNeXt(**TINY, version=v).state_dict() for v in (2, 1))
    assert v2["stages.2.1.grn.gamma"].shape == (1, 1, 1, 128) and v1["stages.2.1.gamma"].shape == (32,)
    block = {"dwconv.weight", "dwconv.bias", "norm.weight", "norm.bias"} | {
        f"pwconv{k}.{p}" for k in "12" for p in ("weight", "bias")
    }
    keys = {f"stages.{i}.{j}.{k}" for i, depth in enumerate(TINY["depths"]) for j in range(depth) for k in block}
    keys |= {f"downsample_layers.{i}.{k}.{p}" for i in range(4) for k in "01" for p in ("weight", "bias")}
    keys |= {f"{module}.{p}" for module in ("norm", "head") for p in ("weight", "bias")}
    blocks = {key.rsplit(".", 2)[0] for key in keys if ".dwconv.weight" in key}
    assert set(v2) == keys | {f"{b}.grn.{p}" for b in blocks for p in ("gamma", "beta")}
    assert set(v1) == keys | {f"{b}.gamma" for b in blocks}


def test_initial_values():
    net = ConvNeXt(**TINY, version=1, drop_path_rate=0.4, head_init_scale=0.5)
    assert net.stages[2][1].gamma.unique().tolist() == [pytest.approx(1e-6)]
    assert ConvNeXt(**TINY, version=1, layer_scale_init_value=0.5).stages[2][1].gamma.unique().tolist() == [0.5]
    assert net.stages[3][0].pwconv1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.head.weight.std().item() == pytest.approx(0.01, rel=0.1) and not net.head.bias.any()
    assert [block.drop_path.p for stage in net.stages for block in stage] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_channels_last_changes_nothing():
    net, imgs = randomised(ConvNeXt(**TINY)).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = net(imgs)
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(imgs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32_and_has_finite_gradients(dtype):
    net, imgs = ConvNeXt(**TINY, num_classes=7), torch.randn(2, 3, 64, 64)
    expected = net(imgs)
    with torch.autocast("cpu", dtype):
        logits = net(imgs)
    logits.float().square().sum().backward()
    assert relative_error(logits.float(), expected) < 0.05
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("how", ["export", "trace", pytest.param("compile", marks=pytest.mark.slow)])
def test_compiled_exported_and_traced_models_compute_the_same(how):
    net, imgs = randomised(ConvNeXt(**TINY, num_classes=7)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if how == "compile":
            other = torch.compile(net)
        else:
            other = torch.jit.trace(net, imgs) if how == "trace" else torch.export.export(net, (imgs,)).module()
        torch.testing.assert_close(other(imgs), net(imgs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ConvNeXt(**TINY, stem_stride=3), "stem_stride 3"),
        (lambda: ConvNeXt(**TINY, in_chans=0), "in_chans 0"),
        (lambda: ConvNeXt(**TINY)(torch.randn(1, 3, 16, 64)), "16 x 64"),
        (lambda: ConvNeXt(**TINY)(torch.randn(1, 1, 64, 64)), "(1, 1, 64, 64)"),
        (lambda: ConvNeXt(**TINY)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), "uint8"),
    ],
)
def test_errors_name_the_value(call, words):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        call()
    assert words in str(error.value)
