"""Claims about fcmae.py."""

import pytest
import torch
from helpers import TINY, randomised
from torch._dynamo.testing import CompileCounterWithBackend

from fcmae import FCMAE, random_mask, reconstruction_panels
from model import MODELS, ConvNeXt
from sparse import upsample_mask

# REFERENCE: encoder without head, 512-wide decoder of one block.
PARAMETERS = {
    "atto": 7_257_992,
    "femto": 8_751_472,
    "pico": 12_521_792,
    "nano": 19_016_592,
    "tiny": 31_965_568,
    "base": 91_922_432,
    "large": 200_910_592,
    "huge": 662_616_192,
}


def small_mae(**kwargs) -> FCMAE:
    torch.manual_seed(0)
    encoder = ConvNeXt(**TINY, num_classes=0, stem_stride=kwargs.pop("stem_stride", 1), in_chans=kwargs.pop("in_chans", 3))
    return FCMAE(encoder, decoder_embed_dim=16, **kwargs)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_equal_the_published_ones(size):
    with torch.device("meta"):
        mae = FCMAE(MODELS[f"convnextv2_{size}"](num_classes=0))
    assert sum(p.numel() for p in mae.parameters()) == PARAMETERS[size]


@pytest.mark.parametrize("size", ["atto", "femto", "pico", "nano", "tiny"])
def test_initial_loss_is_about_one(size):
    torch.manual_seed(0)
    mae = FCMAE(MODELS[f"convnextv2_{size}"](num_classes=0))
    with torch.no_grad():
        loss, pred, mask = mae(torch.rand(2, 3, 128, 128))
    assert 0.9 < loss < 1.15 and pred.shape == (2, 16, 32 * 32 * 3) and mask.shape == (2, 4, 4)


@pytest.mark.parametrize(("h", "w", "ratio"), [(7, 7, 0.6), (4, 4, 0.6), (3, 5, 0.75), (8, 8, 0.1)])
def test_every_mask_keeps_the_exact_count(h, w, ratio):
    mask = random_mask(50, h, w, ratio)
    assert (~mask).sum(dim=(1, 2)).unique().tolist() == [int(h * w * (1 - ratio))]


def test_masks_are_uniform_over_cells_and_over_pairs_of_cells():
    n = 20_000
    visible = (~random_mask(n, 4, 4, 0.6, torch.Generator().manual_seed(0))).flatten(1).double()
    keep = 6
    frequency = visible.mean(dim=0)
    assert (frequency - keep / 16).abs().max() < 5 * (keep / 16 * (1 - keep / 16) / n) ** 0.5
    pairs = (visible.T @ visible / n)[~torch.eye(16, dtype=torch.bool)]
    p = keep * (keep - 1) / (16 * 15)
    assert (pairs - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5


def test_patchify_orders_pixels_by_row_column_channel_and_unpatchify_inverts_it():
    mae = small_mae(in_chans=2)
    imgs = torch.randn(2, 2, 16, 24)
    patches = mae.patchify(imgs)
    assert patches.shape == (2, 6, 128)
    for patch, y, x, c in ((0, 0, 0, 0), (4, 3, 5, 1), (5, 7, 7, 0)):
        assert torch.equal(patches[:, patch, (y * 8 + x) * 2 + c], imgs[:, c, patch // 3 * 8 + y, patch % 3 * 8 + x])
    assert torch.equal(mae.unpatchify(patches, 2, 3), imgs)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_the_mean_over_hidden_patches_of_the_mean_squared_error(norm_pix_loss):
    mae = small_mae(norm_pix_loss=norm_pix_loss).double()
    imgs = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    mask = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]], dtype=torch.bool)
    loss, pred, _ = mae(imgs, mask)
    errors = []
    for n in range(2):
        for cell in range(6):
            y, x = divmod(cell, 3)
            if mask[n, y, x]:
                pixels = [imgs[n, c, 8 * y + i, 8 * x + j] for i in range(8) for j in range(8) for c in range(3)]
                if norm_pix_loss:
                    mean = sum(pixels) / len(pixels)
                    var = sum((v - mean) ** 2 for v in pixels) / (len(pixels) - 1)
                    pixels = [(v - mean) / (var + 1e-6) ** 0.5 for v in pixels]
                errors.append(sum((a - b) ** 2 for a, b in zip(pred[n, cell], pixels)) / len(pixels))
    torch.testing.assert_close(loss, sum(errors) / len(errors))


def test_backends_agree_except_the_leaky_one():
    imgs, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), random_mask(2, 4, 4, 0.6)
    losses = {
        backend: randomised(small_mae(backend=backend).double())(imgs, mask)[0].item()
        for backend in ("sparse", "reference", "masked", "leaky")
    }
    assert losses["sparse"] == pytest.approx(losses["masked"], rel=1e-12)
    assert losses["reference"] == pytest.approx(losses["masked"], rel=1e-12)
    assert losses["leaky"] != pytest.approx(losses["masked"], rel=1e-4)


def test_the_leaky_encoder_is_the_dense_one_on_the_zero_filled_image():
    mae = small_mae(backend="leaky")
    imgs, mask = torch.randn(2, 3, 32, 32), random_mask(2, 4, 4, 0.6)
    zero_filled = imgs * ~upsample_mask(mask, 8)[:, None]
    expected = mae.encoder.forward_stages(zero_filled)[-1] * ~mask[:, None]
    torch.testing.assert_close(mae.forward_encoder(imgs, mask), expected)


@pytest.mark.parametrize("backend", ["sparse", "reference", "masked", "leaky"])
def test_hidden_pixels_reach_neither_encoding_nor_prediction(backend):
    mae = randomised(small_mae(backend=backend))
    imgs, mask = torch.randn(2, 3, 32, 32), random_mask(2, 4, 4, 0.6)
    spoiled = imgs.masked_fill(upsample_mask(mask, 8)[:, None], float("nan"))
    assert torch.equal(mae.forward_encoder(spoiled, mask), mae.forward_encoder(imgs, mask))
    assert torch.equal(mae(spoiled, mask)[1], mae(imgs, mask)[1])
    assert not mae.forward_encoder(imgs, mask).permute(0, 2, 3, 1)[mask].any()


def test_the_same_generator_state_gives_the_same_mask():
    mae, imgs = small_mae(), torch.randn(4, 3, 32, 32)
    masks = [mae(imgs, generator=torch.Generator().manual_seed(seed))[2] for seed in (3, 3, 4)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_rectangles_other_channels_and_decoder_shapes():
    mae = small_mae(in_chans=5, decoder_depth=2, mask_ratio=0.75)
    loss, pred, mask = mae(torch.randn(2, 5, 16, 40))
    assert loss.isfinite() and pred.shape == (2, 10, 8 * 8 * 5) and mask.sum(dim=(1, 2)).tolist() == [8, 8]
    loss.backward()
    assert all(p.grad is not None for p in mae.parameters())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(norm_pix_loss):
    mae = small_mae(norm_pix_loss=norm_pix_loss)
    imgs = torch.randn(2, 3, 16, 24)
    target = mae.patchify(imgs)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    torch.testing.assert_close(mae.reconstruct(imgs, target), imgs)


def test_panels_keep_visible_pixels():
    mae, imgs = small_mae(), torch.randn(2, 3, 32, 32)
    panels = reconstruction_panels(mae, imgs, torch.Generator().manual_seed(0))
    visible = panels["visible"] != 0
    assert torch.equal(panels["pasted"][visible], imgs[visible])
    assert visible.float().mean() == pytest.approx(6 / 16, abs=1e-3)


def test_autocast_gives_a_float32_loss():
    mae = small_mae()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = mae(torch.randn(2, 3, 32, 32))
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_traced_by_the_compiler_equals_eager_in_few_graphs():
    """With the compiler's own kernels left out, which would take a minute to build."""
    mae, compiler = small_mae(), CompileCounterWithBackend("aot_eager")
    imgs, mask = torch.randn(2, 3, 32, 32), random_mask(2, 4, 4, 0.6)
    losses, gradients = [], []
    for call in (mae, torch.compile(mae, backend=compiler)):
        mae.zero_grad()
        loss, _, _ = call(imgs, mask)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in mae.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert compiler.frame_count <= 5  # checks of the mask, what comes before the index tables, the encoder's stages, the decoder


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FCMAE(ConvNeXt(**TINY)), "num_classes=0"),
        (lambda: small_mae(backend="dense"), "backend 'dense'"),
        (lambda: small_mae(mask_ratio=1.5), "mask_ratio 1.5"),
        (lambda: small_mae(decoder_depth=-1), "decoder_depth -1"),
        (lambda: small_mae()(torch.randn(1, 3, 20, 32)), "image size 20 is not a multiple of the patch size 8"),
        (lambda: small_mae()(torch.randn(1, 4, 32, 32)), "(1, 4, 32, 32)"),
        (lambda: small_mae()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8"),
        (
            lambda: small_mae()(torch.randn(1, 3, 8, 8)),
            "leaves no patch visible of 1 x 1; take larger images, or a smaller stem_stride",
        ),
        (lambda: small_mae(mask_ratio=0.99)(torch.randn(1, 3, 32, 32)), "mask_ratio 0.99 leaves no patch visible"),
        (lambda: small_mae()(torch.randn(1, 3, 32, 32), torch.zeros(1, 4, 4)), "boolean"),
        (lambda: small_mae()(torch.randn(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.bool)), "(1, 16)"),
        (lambda: small_mae()(torch.randn(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool)), "hides no patch"),
        (lambda: small_mae()(torch.randn(1, 3, 32, 32), torch.ones(1, 4, 4, dtype=torch.bool)), "leaves no patch visible"),
    ],
)
def test_errors_are_one_line_that_names_the_value(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
