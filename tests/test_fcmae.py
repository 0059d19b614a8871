"""Claims about fcmae.py: mask, encode, decode, loss; and about the errors of model.py, sparse.py and fcmae.py."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, randomised

from fcmae import FCMAE, random_mask
from model import MODELS, SIZES, ConvNeXt
from pretrain import reconstruction_panels
from sparse import leaky_stages, masked_stages, upsample_mask

# REFERENCE: encoder without head, 512-wide decoder of one block.
PARAMETERS = [7_257_992, 8_751_472, 12_521_792, 19_016_592, 31_965_568, 91_922_432, 200_910_592, 662_616_192]


def make_mae(stem_stride: int = 1, in_chans: int = 3, decoder_embed_dim: int = 16, **options) -> FCMAE:
    torch.manual_seed(0)
    encoder = ConvNeXt(**TINY, num_classes=0, stem_stride=stem_stride, in_chans=in_chans)
    return FCMAE(encoder, decoder_embed_dim=decoder_embed_dim, **options)


@pytest.mark.parametrize(("h", "w", "ratio"), [(7, 7, 0.6), (4, 4, 0.6), (3, 5, 0.75), (8, 8, 0.1)])
def test_every_mask_keeps_the_exact_count(h, w, ratio):
    mask = random_mask(50, h, w, ratio)
    assert mask.shape == (50, h, w) and (~mask).sum(dim=(1, 2)).unique().tolist() == [int(h * w * (1 - ratio))]


def test_masks_are_uniform_over_cells_and_over_pairs_of_cells():
    n, keep = 20_000, 6
    visible = (~random_mask(n, 4, 4, 0.6, torch.Generator().manual_seed(0))).flatten(1).double()
    pairs = (visible.T @ visible / n)[~torch.eye(16, dtype=torch.bool)]
    for frequency, p in ((visible.mean(dim=0), keep / 16), (pairs, keep * (keep - 1) / (16 * 15))):
        assert (frequency - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5


def test_the_same_generator_state_gives_the_same_mask():
    mae, imgs = make_mae(), torch.randn(4, 3, 32, 32)
    masks = [mae(imgs, generator=torch.Generator().manual_seed(seed))[2] for seed in (3, 3, 4)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(masks[0], random_mask(4, 4, 4, 0.6, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("backend", ["sparse", "reference", "masked", "leaky"])
def test_the_encoding_is_that_of_the_backend_and_zero_where_hidden(backend):
    mae = randomised(make_mae(backend=backend).double())
    imgs, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), random_mask(2, 4, 4, 0.6)
    encoding, oracle = mae.forward_encoder(imgs, mask), leaky_stages if backend == "leaky" else masked_stages
    torch.testing.assert_close(encoding, oracle(mae.encoder, imgs, mask)[-1])
    assert not encoding.permute(0, 2, 3, 1)[mask].any() and encoding.permute(0, 2, 3, 1)[~mask].any(dim=1).all()


def test_parameter_counts_equal_the_published_ones():
    with torch.device("meta"):
        maes = [FCMAE(MODELS[f"convnextv2_{size}"](num_classes=0)) for size in list(SIZES)[1:]]
    assert [sum(p.numel() for p in mae.parameters()) for mae in maes] == PARAMETERS


def test_initial_values():
    mae = make_mae(decoder_embed_dim=128)
    weights = [mae.proj.weight, mae.mask_token, mae.pred.weight, mae.decoder[0].dwconv.weight]
    assert [w.std().item() for w in weights] == pytest.approx([0.02] * 4, rel=0.2)
    assert not any(module.bias.any() for module in (mae.proj, mae.pred, mae.decoder[0].pwconv1))


def test_the_decoder_sees_the_projected_encoding_and_the_mask_token_alone_at_hidden_cells():
    mae = randomised(make_mae(decoder_depth=0).double())
    imgs, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.rand(2, 4, 4) < 0.5
    pred, features = mae(imgs, mask)[1].view(2, 4, 4, -1), mae.forward_encoder(imgs, mask).permute(0, 2, 3, 1)
    (proj, proj_bias), (weight, bias) = ((m.weight[:, :, 0, 0].T, m.bias) for m in (mae.proj, mae.pred))
    torch.testing.assert_close(pred[~mask], (features[~mask] @ proj + proj_bias) @ weight + bias)
    torch.testing.assert_close(pred[mask], (mae.mask_token.flatten() @ weight + bias).expand_as(pred[mask]))


def test_rectangles_other_channels_and_decoder_shapes():
    mae = make_mae(in_chans=5, decoder_depth=2, mask_ratio=0.75)
    loss, pred, mask = mae(torch.randn(2, 5, 16, 40))
    assert loss.isfinite() and pred.shape == (2, 10, 8 * 8 * 5) and mask.sum(dim=(1, 2)).tolist() == [8, 8]
    loss.backward()
    assert len(mae.decoder) == 2 and all(p.grad is not None for p in mae.parameters())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_the_mean_squared_error_over_hidden_patches_and_a_perfect_prediction_is_the_image(norm_pix_loss):
    mae, imgs = make_mae(norm_pix_loss=norm_pix_loss).double(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    mask = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]], dtype=torch.bool)
    loss, pred, _ = mae(imgs, mask)
    target = torch.empty_like(pred)
    for n, y, x in product(range(2), range(2), range(3)):
        pixels = imgs[n, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].permute(1, 2, 0).flatten()
        target[n, 3 * y + x] = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt() if norm_pix_loss else pixels
    torch.testing.assert_close(loss, F.mse_loss(pred[mask.flatten(1)], target[mask.flatten(1)]))
    torch.testing.assert_close(mae.reconstruct(imgs, target), imgs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_a_float32_loss_near_that_without(dtype):
    mae, imgs, mask = make_mae(), torch.randn(2, 3, 32, 32), random_mask(2, 4, 4, 0.6)
    with torch.autocast("cpu", dtype):
        loss, pred, _ = mae(imgs, mask)
    assert loss.dtype == torch.float32 and pred.dtype == dtype
    torch.testing.assert_close(loss, mae(imgs, mask)[0], rtol=1e-2, atol=0)


def test_panels_show_pixels_where_visible_and_predictions_where_hidden():
    mae, imgs = make_mae(), torch.randn(2, 3, 32, 32)
    panels = reconstruction_panels(mae, imgs, torch.Generator().manual_seed(0))
    _, pred, mask = mae(imgs, generator=torch.Generator().manual_seed(0))
    hidden, prediction = upsample_mask(mask, 8)[:, None], mae.reconstruct(imgs, pred)
    assert torch.equal(panels["original"], imgs) and torch.equal(panels["visible"], imgs * ~hidden)
    assert torch.equal(panels["prediction"], prediction * hidden)
    assert torch.equal(panels["pasted"], imgs * ~hidden + prediction * hidden)


IMGS, MASK = torch.ones(1, 3, 32, 32), torch.ones(1, 4, 4, dtype=torch.bool)
ERRORS = [
    (lambda: ConvNeXt(**TINY, stem_stride=3), "stem_stride 3"),
    (lambda: ConvNeXt(**TINY, in_chans=0), "in_chans 0"),
    (lambda: ConvNeXt(**TINY, num_classes=-1), "num_classes -1"),
    (lambda: ConvNeXt(**TINY)(IMGS[:, :, :16]), "16 x 32"),
    (lambda: ConvNeXt(**TINY)(IMGS[:, :1]), "(1, 1, 32, 32)"),
    (lambda: ConvNeXt(**TINY)(IMGS.byte()), "uint8"),
    (lambda: FCMAE(ConvNeXt(**TINY)), "num_classes=0"),
    (lambda: make_mae(backend="dense"), "backend 'dense'"),
    (lambda: make_mae(mask_ratio=1.5), "mask_ratio 1.5"),
    (lambda: make_mae(decoder_depth=-1), "decoder_depth -1"),
    (lambda: make_mae(decoder_embed_dim=0), "decoder_embed_dim 0"),
    (lambda: make_mae()(IMGS[:, :, :20]), "image size 20 is not a multiple of the patch size 8; try"),
    (lambda: make_mae()(IMGS[:, :2]), "(1, 2, 32, 32)"),
    (lambda: make_mae()(IMGS, ~MASK), "hides no patch"),
    (lambda: make_mae()(IMGS, MASK), "leaves no patch visible"),
    (lambda: make_mae()(IMGS[:, :, :20], MASK), "image size 20 is not a multiple of the patch size 8; try"),
    (lambda: make_mae()(IMGS[:, :2], MASK), "(1, 2, 32, 32)"),
    (lambda: make_mae()(IMGS, MASK[:, :2]), "mask of shape (1, 2, 4)"),
    (lambda: make_mae(backend="masked")(IMGS, MASK.float()), "mask of type torch.float32"),
    (lambda: make_mae(backend="leaky")(IMGS, MASK.tolist()), "mask of type list"),
]


@pytest.mark.parametrize(("call", "words"), ERRORS)
def test_errors_are_one_line_that_names_the_value(call, words):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        call()
    assert words in str(error.value)
