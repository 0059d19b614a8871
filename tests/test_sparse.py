"""Claims about sparse.py: the sparse encoder is the dense one with masks, at the visible sites only."""

from functools import partial

import pytest
import torch
from helpers import CPU, TINY, randomised
from test_model import outputs_and_gradients, random_loss

from experiments.bench import memory
from fcmae import BACKENDS, random_mask
from model import ConvNeXt
from sparse import SparseTensor, upsample_mask

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
H, W = 3, 4  # the grid of patches in most tests
MASKS = ["equal", "unequal", "one image empty", "none visible", "all visible"]


def make_mask(kind: str, n: int = 3) -> torch.Tensor:
    """(n, H, W), True = hidden."""
    generator = torch.Generator().manual_seed(1)
    if kind == "equal":
        return random_mask(n, H, W, 0.55, generator)
    mask = torch.rand(n, H, W, generator=generator) < {"none visible": 1, "all visible": 0}.get(kind, 0.6)
    if kind == "one image empty":
        mask[n // 2] = True
    return mask


def make_net(version=2, stem_stride=1, **options) -> ConvNeXt:
    torch.manual_seed(0)
    return randomised(ConvNeXt(**TINY, version=version, stem_stride=stem_stride, num_classes=0, **options).double())


def make_images(net: ConvNeXt, n: int = 3) -> torch.Tensor:
    generator, (h, w) = torch.Generator().manual_seed(2), (H * net.patch_size, W * net.patch_size)
    return torch.randn(n, net.in_chans, h, w, generator=generator, dtype=torch.float64)


def encode(net, imgs, mask, backend) -> list[torch.Tensor]:
    """The four stages' maps."""
    stages = BACKENDS[backend](net, imgs, mask)
    return [stage.dense() if isinstance(stage, SparseTensor) else stage for stage in stages]


def assert_near(tensors: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for tensor, reference in zip(tensors, expected, strict=True):
        assert (tensor - reference).norm() <= 1e-10 * reference.norm()


NETWORKS = [(3, {}), (3, dict(version=1)), (1, dict(stem_stride=2)), (2, dict(stem_stride=4, in_chans=2))]


@pytest.mark.parametrize("backend", ["sparse", "reference"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("n", "options"), NETWORKS)
def test_stages_and_every_gradient_equal_the_masked_oracles(n, options, kind, backend):
    net = make_net(**options)
    imgs, mask = make_images(net, n), make_mask(kind, n)
    check_against_masked(net, imgs, mask, backend)
    if kind == "all visible":
        assert_near(encode(net, imgs, mask, backend), net.forward_stages(imgs))


def check_against_masked(net, imgs, mask, backend):
    runs = (partial(encode, mask=mask, backend=name) for name in (backend, "masked"))
    assert_near(*(outputs_and_gradients(run, net, imgs) for run in runs))


def test_the_leaky_encoder_is_the_dense_network_on_the_zero_filled_image():
    net = make_net()
    imgs, mask = make_images(net), make_mask("unequal")
    expected = net.forward_stages(imgs * ~upsample_mask(mask, 8)[:, None])
    for i, stage in enumerate(encode(net, imgs, mask, "leaky")):
        assert torch.equal(stage, expected[i] * ~upsample_mask(mask, 8 >> i)[:, None])
        assert not torch.allclose(stage, encode(net, imgs, mask, "masked")[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_hidden_pixels_change_neither_the_encoding_nor_its_gradients(backend, value):
    net, mask = make_net(), make_mask("one image empty")
    imgs = [make_images(net).masked_fill(upsample_mask(mask, 8)[:, None], filled) for filled in (0, value)]
    results = [outputs_and_gradients(partial(encode, mask=mask, backend=backend), net, x) for x in imgs]
    assert all(torch.equal(tensor, expected) for tensor, expected in zip(*results))


def test_mlps_and_norms_see_visible_sites_only():
    net, mask, rows = make_net(), make_mask("equal"), {}
    for name, module in net.named_modules():
        if name.endswith((".norm", ".pwconv1", ".grn", ".pwconv2")):
            module.register_forward_hook(lambda *args, name=name: rows.update({name: args[2][..., 0].numel()}))
    encode(net, make_images(net), mask, "sparse")
    assert len(rows) == 4 * sum(TINY["depths"])
    assert all(count == int((~mask).sum()) * 4 ** (3 - int(name.split(".")[1])) for name, count in rows.items())


@pytest.mark.parametrize("backend", ["dense", "masked", "sparse"])
def test_activations_computed_again_give_the_same_gradients_from_less_memory(backend):
    net, results, kept = make_net(), [], []
    masked, imgs = partial(encode, mask=make_mask("equal"), backend=backend), make_images(net)
    run = ConvNeXt.forward_stages if backend == "dense" else masked
    for enable in (False, True):
        net.checkpoint_activations(enable)
        results.append(outputs_and_gradients(run, net, imgs))
        kept.append(memory(lambda: random_loss(run(net, imgs)), CPU))
    assert all(torch.equal(tensor, expected) for tensor, expected in zip(*results))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_stochastic_depth_draws_as_the_dense_network_does(kind):
    net, stages = make_net(drop_path_rate=0.5).train(), []
    for backend in ("masked", "sparse"):
        torch.manual_seed(1)
        stages.append(torch.cat([encode(net, make_images(net), make_mask(kind), backend)[-1] for _ in range(4)]))
    torch.testing.assert_close(*stages)
    assert not torch.allclose(stages[1][:3], stages[1][3:6])


# Of the weights, and under autocast; on a GPU float32 convolutions take TF32.
ON_CPU = [(F32, None, 1e-5), (BF16, None, 0.1), (F32, BF16, 0.1), (F16, None, 0.02), (F32, F16, 0.02)]
ON_GPU = [(F64, None, 1e-10), (F32, None, 1e-3), (BF16, None, 0.1), (F16, None, 0.02)]
PRECISIONS = [("cpu", *row) for row in ON_CPU] + [pytest.param("cuda", *row, marks=cuda) for row in ON_GPU]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("device", "dtype", "autocast", "tolerance"), PRECISIONS)
def test_other_precisions_and_devices_stay_near_float64_on_the_cpu(device, dtype, autocast, tolerance, kind):
    net, mask = make_net(), make_mask(kind)  # the mask stays on the CPU
    imgs, vectors = make_images(net), []
    for backend, *place in (("masked", "cpu", F64), ("sparse", device, dtype)):
        with torch.autocast(device, autocast, enabled=bool(autocast) and backend == "sparse"):
            last = encode(net.to(*place), imgs.to(*place), mask, backend)[-1]
        tensors = [last, *torch.autograd.grad(last.square().sum(), net.parameters())]
        vectors.append(torch.cat([tensor.flatten() for tensor in tensors]).cpu().double())
    assert (vectors[1] - vectors[0]).norm() <= tolerance * vectors[0].norm()
