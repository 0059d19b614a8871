"""Claims about sparse.py: the sparse encoder is the dense one with masks, at the visible sites only."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, randomised
from test_model import relative_error

from model import ConvNeXt
from sparse import (
    Sites,
    SparseTensor,
    masked_stages,
    reference_conv,
    sparse_stages,
    submanifold_conv,
    upsample_mask,
)

H, W = 3, 4  # the grid of patches in most tests


def some_mask(kind: str, n: int = 3) -> torch.Tensor:
    """(n, H, W), True = hidden."""
    generator = torch.Generator().manual_seed(1)
    if kind == "equal":
        order = torch.rand(n, H * W, generator=generator).argsort(dim=1)
        return (order >= 5).view(n, H, W)
    mask = torch.rand(n, H, W, generator=generator) < 0.6
    if kind == "one image empty":
        mask[n // 2] = True
    elif kind == "none visible":
        mask[:] = True
    elif kind == "all visible":
        mask[:] = False
    return mask


MASKS = ["equal", "unequal", "one image empty", "none visible", "all visible"]


def network(version=2, stem_stride=1, **kwargs) -> ConvNeXt:
    return randomised(ConvNeXt(**TINY, version=version, stem_stride=stem_stride, num_classes=0, **kwargs).double())


def images_for(net: ConvNeXt, n: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, net.in_chans, H * net.patch_size, W * net.patch_size, generator=generator, dtype=torch.float64)


def encode(net, imgs, mask, backend):
    if backend == "masked":
        return masked_stages(net, imgs, mask)[-1]
    conv = reference_conv if backend == "reference" else submanifold_conv
    return sparse_stages(net, imgs, mask, conv)[-1].dense()


# --- the convolution


def refined(mask: torch.Tensor, side: int) -> Sites:
    """`side` x `side` sites in each patch."""
    sites = Sites.from_mask(mask)
    while sites.side < side:
        sites = sites.finer()
    return sites


@pytest.mark.parametrize("side", [2, 8])  # on whole images, and on patches with what surrounds them
@pytest.mark.parametrize("conv", [reference_conv, submanifold_conv])
@pytest.mark.parametrize("kind", MASKS)
def test_convolution_equals_conv2d_between_two_masks(conv, kind, side):
    mask = some_mask(kind)
    sites = refined(mask, side)
    assert sites.tiles.padding == (0 if side == 8 and "visible" not in kind else 3)
    hidden = upsample_mask(mask, side)[:, None]
    x = torch.randn(3, 6, side * H, side * W, dtype=torch.float64)
    weight, bias = torch.randn(6, 1, 7, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = F.conv2d(x.masked_fill(hidden, 0), weight, bias, padding=3, groups=6).masked_fill(hidden, 0)
    y = conv(x.permute(0, 2, 3, 1).flatten(0, 2)[sites.cell], weight, bias, sites)
    torch.testing.assert_close(SparseTensor(y, sites).dense(), expected)


@pytest.mark.parametrize("side", [2, 8])
def test_gradients_of_the_convolution_equal_finite_differences(side):
    sites = refined(some_mask("unequal", 2), side)
    x = torch.randn(len(sites.cell), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 7, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: submanifold_conv(*args, sites), (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize("n", [1, 3])
def test_float32_weight_gradient_by_exchanged_roles_equals_float64(n, side):
    sites = refined(some_mask("unequal", n), side)
    x, weight, bias = torch.randn(len(sites.cell), 5), torch.randn(5, 1, 7, 7), torch.randn(5)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        w = weight.detach().to(dtype).requires_grad_()
        submanifold_conv(x.to(dtype), w, bias.to(dtype), sites).square().sum().backward()
        gradients.append(w.grad.double())
    assert relative_error(*gradients) < 1e-5


# --- the sites


def test_children_of_row_r_are_rows_4r_to_4r_plus_3():
    mask = some_mask("unequal")
    coarse = Sites.from_mask(mask)
    fine = coarse.finer()
    n, y, x = torch.unravel_index(coarse.cell, coarse.grid)
    fn, fy, fx = torch.unravel_index(fine.cell, fine.grid)
    for child in range(4):
        assert torch.equal(fn[child::4], n)
        assert torch.equal(fy[child::4], 2 * y + child // 2) and torch.equal(fx[child::4], 2 * x + child % 2)
    assert fine.counts == [4 * int(v) for v in (~mask).sum(dim=(1, 2))]


# --- the encoder


@pytest.mark.parametrize("backend", ["sparse", "reference"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("version", [1, 2])
def test_encoding_and_every_gradient_equal_the_masked_oracles(version, kind, backend):
    net = network(version)
    check_against_masked(net, images_for(net), some_mask(kind), backend)


@pytest.mark.parametrize("stem_stride", [2, 4])
@pytest.mark.parametrize("n", [1, 2])
def test_sparse_equals_masked_for_other_stems_and_batches(stem_stride, n):
    net = network(stem_stride=stem_stride, in_chans=2)
    check_against_masked(net, images_for(net, n), some_mask("equal", n), "sparse")


def check_against_masked(net, imgs, mask, backend):
    results = []
    for name in ("masked", backend):
        net.zero_grad()
        x = imgs.clone().requires_grad_()
        out = encode(net, x, mask, name)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out, x.grad] + [p.grad.clone() for p in net.parameters()])
    for ours, oracle in zip(results[1], results[0]):
        assert (ours - oracle).norm() <= 1e-10 * oracle.norm()


def test_stochastic_depth_draws_as_the_dense_network_does():
    net = network(drop_path_rate=0.5).train()
    outputs = []
    for backend in ("masked", "sparse"):
        torch.manual_seed(0)
        outputs.append(encode(net, images_for(net), some_mask("equal"), backend))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("backend", ["sparse", "reference", "masked"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_hidden_pixels_do_not_change_the_encoding(backend, value):
    net = network()
    imgs, mask = images_for(net), some_mask("one image empty")
    spoiled = imgs.masked_fill(upsample_mask(mask, net.patch_size)[:, None], value)
    assert torch.equal(encode(net, spoiled, mask, backend), encode(net, imgs, mask, backend))


@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_an_images_encoding_does_not_depend_on_its_batch_mates(kind):
    net = network()
    imgs, mask = images_for(net), some_mask(kind)
    together = sparse_stages(net, imgs, mask)[-1].dense()
    for i in range(len(imgs)):
        torch.testing.assert_close(
            sparse_stages(net, imgs[i : i + 1], mask[i : i + 1])[-1].dense()[0], together[i], rtol=1e-12, atol=1e-12
        )


def test_mlps_norms_and_downsampling_see_visible_sites_only():
    net = network()
    mask = some_mask("equal")
    visible = int((~mask).sum())
    rows = {}

    def count(name):
        def hook(module, args, out):
            rows[name] = out.numel() // out.shape[-1]

        return hook

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(count(name))
    sparse_stages(net, images_for(net), mask)
    assert rows == {f"stages.{i}.{j}.{part}": visible * 4 ** (3 - i)
                    for i in range(4) for j in range(TINY["depths"][i]) for part in ("norm", "pwconv1")} | {
        f"stages.{i}.{j}.pwconv2": visible * 4 ** (3 - i) for i in range(4) for j in range(TINY["depths"][i])}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_float64(dtype, kind):
    net, mask = network(), some_mask(kind)
    imgs = images_for(net)
    expected = masked_stages(net, imgs, mask)[-1]
    out = sparse_stages(net.to(dtype), imgs.to(dtype), mask)[-1].dense()
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[
        dtype
    ] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gradients_stay_near_the_masked_stages(dtype):
    net, mask = network().float(), some_mask("equal")
    imgs, gradients = images_for(net).float(), []
    for backend in ("masked", "sparse"):
        net.zero_grad()
        with torch.autocast("cpu", dtype):
            out = encode(net, imgs, mask, backend)
        out.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
@pytest.mark.parametrize("kind", MASKS)
def test_cuda_gradients_equal_the_masked_oracles(kind, dtype, tolerance):
    net, mask = network(), some_mask(kind)
    imgs = images_for(net)
    results = []
    for backend, device, kind_of_float in (("masked", "cpu", torch.float64), ("sparse", "cuda", dtype)):
        net.to(device, kind_of_float).zero_grad()
        out = encode(net, imgs.to(device, kind_of_float), mask, backend)
        out.square().sum().backward()
        results.append(torch.cat([out.flatten()] + [p.grad.flatten() for p in net.parameters()]).cpu().double())
    assert (results[1] - results[0]).norm() <= tolerance * results[0].norm()


def test_masks_and_images_of_the_wrong_kind_are_named():
    net = network()
    imgs, mask = images_for(net), some_mask("equal")
    for bad_imgs, bad_mask, words in (
        (imgs[:, :, :-1], mask, "image size 23 is not a multiple of the patch size 8"),
        (imgs, mask[:, :2], "mask of shape (3, 2, 4)"),
        (imgs, mask.float(), "mask of type torch.float32"),
        (imgs, mask.tolist(), "mask of type list"),
        (imgs[:, :2], mask, "(3, 2, 24, 32)"),
    ):
        with pytest.raises(ValueError) as error:
            sparse_stages(net, bad_imgs, bad_mask)
        assert words in str(error.value) and "\n" not in str(error.value)
