"""Weights in and out: a ConvNeXt's tensors under this project's names, and under other libraries' names.

    python weights.py IN OUT.pth --to timm    # or hf, mmpretrain, authors; IN may have any layout that is known here
    python weights.py IN DIR --to timm        # or hf: a folder that the library opens, its configuration included
    python weights.py IN OUT.onnx             # or OUT.pt2, for torch.export

In code: `load_weights(model, to_native(read_file(path)))`, or `build(to_native(read_file(path)))` for a network that
fits. "Native" is this project's layout, which the authors' released files have too.

Shapes: C channels, o and i a convolution's output and input channels, k x k = K kernel taps.
"""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from model import MODELS, SIZES, ConvNeXt
from plumbing import dist, files
from plumbing.files import UserError, value_errors_are_the_users

State = dict[str, torch.Tensor]

# A column is a layout, a row a kind of tensor, read in both directions; "=" repeats the first column, "-" is no name.
# The second row is {b}, a block. Fields: p weight or bias, i stage, j block, d stage after the first, q a tensor of its
# norm (0) or convolution (1), v a tensor of another norm in GRN's place (experiments/norms.py).
TABLE = """
native                     timm                       hf                                         mmpretrain
stages.{i}.{j}             stages.{i}.blocks.{j}      encoder.stages.{i}.layers.{j}              stages.{i}.{j}
downsample_layers.0.0.{p}  stem.0.{p}                 embeddings.patch_embeddings.{p}            =
downsample_layers.0.1.{p}  stem.1.{p}                 embeddings.layernorm.{p}                   =
downsample_layers.{d}.{q}  stages.{d}.downsample.{q}  encoder.stages.{d}.downsampling_layer.{q}  =
{b}.dwconv.{p}             {b}.conv_dw.{p}            =                                          {b}.depthwise_conv.{p}
{b}.norm.{p}               =                          {b}.layernorm.{p}                          =
{b}.pwconv1.{p}            {b}.mlp.fc1.{p}            =                                          {b}.pointwise_conv1.{p}
{b}.pwconv2.{p}            {b}.mlp.fc2.{p}            =                                          {b}.pointwise_conv2.{p}
{b}.grn.gamma              {b}.mlp.grn.weight         {b}.grn.weight                             =
{b}.grn.beta               {b}.mlp.grn.bias           {b}.grn.bias                               =
{b}.grn.{v}                -                          -                                          -
{b}.gamma                  =                          {b}.layer_scale_parameter                  =
norm.{p}                   head.norm.{p}              layernorm.{p}                              norm3.{p}
head.{p}                   head.fc.{p}                classifier.{p}                             head.fc.{p}
"""
LAYOUTS, BLOCKS, *NAMES = (row.split() for row in TABLE.strip().splitlines())
FIELDS = dict(p="weight|bias", i="[0-3]", j=r"\d+", d="[1-3]", q=r"[01]\.(?:weight|bias)", v=r"\w+\.[\w.]+")
ENCLOSING = r"(?:encoder\.|backbone\.(?:encoder\.)?|convnext(?:v2)?\.)?"  # a larger network's prefix for its ConvNeXt
# Parts of names that wrappers add: DistributedDataParallel, torch.compile, Lightning, MinkowskiEngine (authors').
WRAPPERS = re.compile(r"\b(module|_orig_mod|model|net|network)\.|(?<!grn\.)\b(ln|linear)\.")
# Tensors besides the encoder in an FCMAE, a detector of detect.py and a segmenter of segment.py.
HEADS = re.compile(
    r"mask_token|(proj|pred|decoder)\..+|(backbone\.(norms|fpn)|rpn|roi_heads)\..+"
    r"|(norms|ppm|lateral|fpn)\.\d\..+|(bottleneck|fuse|classifier|auxiliary)\..+"
)
STEM = "downsample_layers.0.0.weight"


def _patterns(layout: str) -> list[tuple[re.Pattern, dict[str, str]]]:
    """Return, for each row of NAMES, a pattern for its name in `layout` and its names in all layouts."""
    rows = []
    for row in NAMES:
        cells = [(row[0] if cell == "=" else cell).replace("{b}", block) for cell, block in zip(row, BLOCKS)]
        names = dict(zip(LAYOUTS, cells))
        name = re.sub(r"\\{(\w)\\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", re.escape(names[layout]))
        rows.append((re.compile(ENCLOSING + name), names))
    return rows


PATTERNS = {layout: _patterns(layout) for layout in LAYOUTS}


def _rename(key: str, source: str, target: str) -> str | None:
    """Return a tensor's name in another layout, or None if it has none."""
    key = re.sub(r"\.kernel$", ".weight", WRAPPERS.sub("", key))
    for pattern, names in PATTERNS[source]:
        if (match := pattern.fullmatch(key)) and names[target] != "-":
            return names[target].format(**match.groupdict())
    return None


# --- layouts ----------------------------------------------------------------------------------------------------------


def detect_layout(state_dict: State) -> str:
    """Name the layout, "native" for both of the authors' layouts; UserError for anything else."""
    for layout in LAYOUTS:
        if any(_rename(key, layout, "native") == "stages.0.0.dwconv.weight" for key in state_dict):
            return layout
    known = "ConvNeXt V1 and V2 of this project, its authors, timm, Hugging Face transformers and mmpretrain"
    names = shorten(", ".join(state_dict), 100)
    raise UserError(f"no layout is known for these {len(state_dict)} tensors ({names}); known are {known}")


def to_native(state_dict: State) -> State:
    """Convert tensors of any known layout to this project's names and shapes; of larger networks, keep the encoder.

    UserError for an unknown layout, and for tensors that belong neither to a classifier nor to an FCMAE, detector or
    segmenter of this project.
    """
    layout, native, foreign = detect_layout(state_dict), {}, []
    for key, value in state_dict.items():
        name = _rename(key, layout, "native")
        if name and name not in native:
            native[name] = _native_shape(name, value)
        elif layout != "native" or not HEADS.fullmatch(WRAPPERS.sub("", key)):
            foreign.append(key)
    if foreign:
        part = f"{len(foreign)} of {len(state_dict)} tensors are no part of a ConvNeXt in the {layout} layout"
        raise UserError(f"{part} ({shorten(', '.join(foreign), 100)}); give a classifier or encoder")
    return native


def _native_shape(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of any layout in native shape. The authors' sparse kernels list their taps column by column."""
    try:
        if name.endswith((".grn.gamma", ".grn.beta")):
            value = value.reshape(1, 1, 1, -1)
        elif name.endswith("bias"):
            value = value.flatten()  # (1, C) -> (C,)
        elif ".pwconv" in name and value.dim() == 4:
            value = value.flatten(1)  # (o, i, 1, 1) -> (o, i)
        elif re.search(r"\.dwconv\.weight|[1-3]\.1\.weight", name) and value.dim() < 4:
            k = math.isqrt(value.shape[0])
            kernel = value if value.dim() == 3 else value[:, None]  # (K, i, o); depthwise (K, C) -> (K, 1, C)
            value = kernel.permute(2, 1, 0).unflatten(2, (k, k)).transpose(3, 2)  # (K, i, o) -> (o, i, k, k)
        return value.contiguous()
    except (RuntimeError, IndexError):
        raise UserError(f"a tensor of shape {tuple(value.shape)} cannot be the {name} of a ConvNeXt") from None


def describe(state_dict: State) -> str:
    """Describe what `to_native` makes of a state dict."""
    native = to_native(state_dict)
    shape, rest = architecture(native), len(state_dict) - len(native)
    head = f"{shape['num_classes']} classes" if shape["num_classes"] else "no head"
    left_out = f"; {rest} tensors besides the encoder are left out" if rest else ""
    return f"{detect_layout(state_dict)} layout, {len(native)} tensors, {_model_name(**shape)}, {head}{left_out}"


def from_native(state_dict: State, layout: str) -> State:
    """Convert this project's tensors to the layout "timm", "hf", "mmpretrain" or "authors"."""
    layout = "native" if layout == "authors" else layout
    shape, renamed = architecture(state_dict), {}
    prefix = {"hf": "convnextv2." if shape["version"] == 2 else "convnext.", "mmpretrain": "backbone."}.get(layout, "")
    as_convolution = layout == "timm" and shape["dims"][0] < SIZES["tiny"][1][0]  # the MLP in timm's smaller models
    for key, value in state_dict.items():
        name = _rename(key, "native", layout)
        if name is None:
            raise UserError(f"{key} has no name in the {layout} layout; only ConvNeXt V1 and V2 can be converted")
        if ".grn." in key and layout in ("timm", "mmpretrain"):
            value = value.flatten()  # (1, 1, 1, 4C) -> (4C,)
        elif ".pwconv" in key and value.dim() == 2 and as_convolution:
            value = value[:, :, None, None]  # (o, i) -> (o, i, 1, 1)
        renamed[name if key.startswith("head.") else prefix + name] = value
    return renamed


# --- networks ---------------------------------------------------------------------------------------------------------


def architecture(native: State) -> dict:
    """Return the arguments of a fitting `ConvNeXt(**arguments)`, GRN's replacement aside; num_classes 0: no head."""
    kernels = [STEM, *(f"stages.{i}.0.dwconv.weight" for i in range(4))]
    if missing := [key for key in kernels if key not in native or native[key].dim() != 4]:
        raise UserError(f"the weights lack {', '.join(missing)}, kernels of four dimensions that every ConvNeXt has")
    stages = [key[7] for key in native if re.fullmatch(r"stages\.\d\.\d+\.dwconv\.weight", key)]
    return dict(
        depths=tuple(stages.count(str(i)) for i in range(4)),
        dims=tuple(len(native[key]) for key in kernels[1:]),
        version=2 if mlp_norm_of(native) else 1,
        num_classes=len(native["head.weight"]) if "head.weight" in native else 0,
        in_chans=native[STEM].shape[1],
        stem_stride=native[STEM].shape[2],
    )


def mlp_norm_of(native: State) -> str | None:
    """Name the norm in GRN's place, as in `experiments.norms.MLP_NORMS`: "grn" in V2, None in V1."""
    names = [key.split(".grn.")[1].split(".") for key in native if ".grn." in key]
    return next((variant[0] for variant in names if len(variant) > 1), "grn" if names else None)


def _model_name(depths: tuple, dims: tuple, version: int, **_) -> str:
    names = [name for name, make in MODELS.items() if (*make.args, make.keywords["version"]) == (depths, dims, version)]
    return names[0] if names else f"ConvNeXt V{version} of depths {depths} and dims {dims}"


@value_errors_are_the_users()
def build(native: State, load: bool = True, **start: float) -> ConvNeXt:
    """Build a network that fits the tensors and, with `load`, load them; `start`: further arguments of ConvNeXt."""
    net = replace_mlp_norm(ConvNeXt(**architecture(native), **start), mlp_norm_of(native))
    if load:
        load_weights(net, native)
    return net


def make_encoder(args: argparse.Namespace) -> ConvNeXt:
    """Build the encoder that the flags of detect.py or segment.py describe."""
    encoder = MODELS[args.model](num_classes=0, stem_stride=args.stem_stride, drop_path_rate=args.drop_path)
    encoder.checkpoint_activations(args.checkpoint_activations)
    return replace_mlp_norm(encoder, args.mlp_norm)


@value_errors_are_the_users()
def replace_mlp_norm(net: ConvNeXt, name: str | None) -> ConvNeXt:
    """Replace GRN as --mlp_norm says; None leaves it. UserError for an unknown name, and for V1."""
    if name is None or (name == "grn" and net.version == 2):
        return net
    from experiments.norms import replace_norm

    return replace_norm(net, name)


def load_weights(model: ConvNeXt, native: State, other_norm: bool = False) -> list[str]:
    """Copy native tensors into `model`, strictly; return a report, line by line.

    Exceptions: a stem for other input channels is adapted (`adapt_stem`). Initial values stay in final norm and head if
    the model or the file has none, in a head for another number of classes, and, with `other_norm`, in GRN's place.
    UserError for another stem stride, and for anything else missing, unexpected or of another shape.
    """
    source, tensors, own, report = architecture(native), dict(native), model.state_dict(), []
    if source["in_chans"] != model.in_chans:
        tensors[STEM] = adapt_stem(native[STEM], model.in_chans)
        report.append(f"stem adapted from {source['in_chans']} to {model.in_chans} input channels")
    new = {"norm", "head"} - ({key.split(".")[0] for key in native} & {key.split(".")[0] for key in own})
    if source["num_classes"] not in (0, model.num_classes):
        new.add("head")

    def is_new(key):
        return key.split(".")[0] in new or (other_norm and ".grn." in key)

    left_out, kept = [*filter(is_new, native)], [*filter(is_new, own)]
    for what, keys in (("left out", left_out), ("at their initial values", kept)):
        report += [f"{what}: {shorten(', '.join(keys), 200)}"] if keys else []
    tensors = {key: value for key, value in tensors.items() if not is_new(key)}
    theirs = f"{_model_name(**source)} with --stem_stride {source['stem_stride']}"
    ours = f"{_model_name(model.depths, model.dims, model.version)} with --stem_stride {model.stem_stride}"
    problem = f"the weights, of {theirs}, do not fit the model, {ours}"
    _load_strictly(model, tensors | {key: own[key] for key in kept}, problem)
    return [f"loaded {len(tensors)} of the model's {len(own)} tensors", *report]


def _load_strictly(net: nn.Module, state_dict: State, problem: str) -> None:
    try:
        net.load_state_dict(state_dict)
    except RuntimeError as error:
        raise UserError(f"{problem}: {shorten(str(error).split(':', 1)[1], 300)}") from None


def adapt_stem(kernel: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Adapt a stem's kernel (o, i, s, s) -> (o, in_chans, s, s): the same response if all channels are equal.

    For fewer channels, old ones are summed in turn; for more, they repeat, each divided by its number of copies.
    """
    old = kernel.shape[1]
    turn, fractions = torch.arange(max(old, in_chans)), kernel.new_zeros(old, in_chans)
    fractions[turn % old, turn % in_chans] = 1
    return torch.einsum("oihw,ic->ochw", kernel, fractions / fractions.sum(dim=1, keepdim=True))


# --- files ------------------------------------------------------------------------------------------------------------


def read_content(path: str | Path) -> dict:
    """Read a checkpoint of plain types or a .safetensors file; mmdetection's detector as detect.py would save it."""
    if Path(path).suffix == ".safetensors":
        import safetensors.torch  # an optional package

        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error})") from None
    with torch.serialization.safe_globals([argparse.Namespace]):  # in the authors' checkpoints
        content = files.load_file(path)
    state_dict = content.get("state_dict", content)
    is_detector = "roi_head.bbox_head.fc_cls.weight" in state_dict
    return _own_detector(state_dict, content.get("meta") or {}) if is_detector else content


def read_config(path: str | Path) -> dict:
    """Read the flags of the run that wrote a checkpoint of this project; empty for other files."""
    config = read_content(path).get("config")
    own = isinstance(config, dict) and isinstance(config.get("input_size", 0), int)  # timm's is [3, 224, 224]
    return config if own else {}


def read_file(path: str | Path, ema: bool = False) -> State:
    """Read the state dict in a file of any layout, with `ema` the averaged weights; rename a UPerNet's to our names."""
    content = read_content(path)
    top = ", ".join(map(str, list(content)[:5])) or "nothing"
    if ema:
        content = content.get("model_ema") or content.get("state_dict_ema")
        if not content:
            raise UserError(f"{path} holds no averaged weights (model_ema), only {top}; read it without --model_ema")
    while inner := [content[key] for key in ("model", "state_dict", "module") if isinstance(content.get(key), dict)]:
        content = inner[0]
    if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict of tensors, alone or under 'model' or 'state_dict', but {top}")
    return upernet_names(content)


def write_file(path: Path, state_dict: State, top: str | None = None) -> None:
    """Write a .safetensors file, or one for torch.load with the tensors under the key `top`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        tensors = {key: value.contiguous() for key, value in state_dict.items()}
        files.write_atomically(path, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    else:
        files.save_tensors(path, {top: state_dict} if top else state_dict)


def flags_of(path: str | Path, *more: str) -> dict:
    """Read flags from a file: model, stem_stride and mlp_norm, and `more` flags of the run that wrote it."""
    config = read_config(path)
    return _flags_of(to_native(read_file(path))) | {key: config[key] for key in more if key in config}


def _flags_of(native: State) -> dict:
    shape, mlp_norm = architecture(native), mlp_norm_of(native)
    flags = {"stem_stride": shape["stem_stride"]}
    if (name := _model_name(**shape)) in MODELS:
        flags["model"] = name
    return flags if mlp_norm in (None, "grn") else flags | {"mlp_norm": mlp_norm}


def load_classifier(path: str, device: torch.device) -> tuple[dict[str, ConvNeXt], list[str] | None]:
    """Load a checkpoint's classifiers, "model" and perhaps "model_ema", ready to evaluate; and class names."""
    content, networks = read_content(path), {}
    for name in ("model", "model_ema") if content.get("model_ema") else ("model",):
        net = build(to_native(read_file(path, ema=name == "model_ema")))
        if not net.num_classes:
            raise UserError(f"{path} holds no classifier but an encoder; train one with finetune.py --finetune {path}")
        networks[name] = net.to(device, memory_format=torch.channels_last).eval()
    classes = content.get("classes")
    return networks, classes if isinstance(classes, list) and len(classes) <= net.num_classes else None


def load_parts(net: nn.Module, encoder: ConvNeXt, path: str, what: str) -> list[str]:
    """Load a file of any layout into `net`, a network (`what`) built on `encoder`; return a report.

    All of the encoder's tensors must fit. Others are loaded if the file has one of the same name and shape.
    """
    tensors, own = {WRAPPERS.sub("", name): value for name, value in read_file(path).items()}, net.state_dict()
    report = [f"{path}: {describe(tensors)}", *load_weights(encoder, to_native(tensors))]
    heads = [name for name in own if HEADS.fullmatch(name)]
    fitting = {name: tensors[name] for name in heads if name in tensors and tensors[name].shape == own[name].shape}
    net.load_state_dict(fitting, strict=False)
    initial = ", ".join(sorted({name.rsplit(".", 1)[0] for name in heads if name not in fitting}))
    kept = f"; at their initial values: {shorten(initial, 200)}" if initial else ""
    return [*report, f"loaded {len(fitting)} of the {what}'s {len(heads)} other tensors{kept}"]


def load_saved(content: dict, make: Callable[[], nn.Module], path: str, device: torch.device) -> dict[str, nn.Module]:
    """Load a checkpoint's networks, "model" and perhaps "model_ema", ready to evaluate; UserError if unfit."""
    networks = {name: make().eval() for name in ("model", "model_ema") if content.get(name)}
    for name, net in networks.items():
        _load_strictly(net, content[name], f"{path} and the network that it describes differ")
        dist.to_device(net, device)
    return networks


# --- detectors and segmenters of other libraries ----------------------------------------------------------------------

# Modules outside the encoder: names in OpenMMLab's Mask R-CNN and transformers' UPerNet -> ours; n is i + 1.
MODULES = {
    "backbone.norm{i}": "backbone.norms.{i}",
    "neck.lateral_convs.{i}": "backbone.fpn.inner_blocks.{i}",
    "neck.fpn_convs.{i}": "backbone.fpn.layer_blocks.{i}",
    "rpn_head.rpn_conv": "rpn.head.conv.0.0",
    "rpn_head.rpn_cls": "rpn.head.cls_logits",
    "rpn_head.rpn_reg": "rpn.head.bbox_pred",
    "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc6",
    "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc7",
    "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
    "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
    "roi_head.mask_head.convs.{i}": "roi_heads.mask_head.{i}",
    "roi_head.mask_head.upsample": "roi_heads.mask_predictor.conv5_mask",
    "roi_head.mask_head.conv_logits": "roi_heads.mask_predictor.mask_fcn_logits",
    "backbone.hidden_states_norms.stage{n}": "norms.{i}",
    "decode_head.psp_modules.{i}.1": "ppm.{i}",
    "decode_head.lateral_convs.{i}": "lateral.{i}",
    "decode_head.fpn_convs.{i}": "fpn.{i}",
    "decode_head.bottleneck": "bottleneck",
    "decode_head.fpn_bottleneck": "fuse",
    "decode_head.classifier": "classifier",
    "auxiliary_head.convs.0": "auxiliary.0",
    "auxiliary_head.classifier": "auxiliary.1",
}


def _own_modules(state_dict: State, layout: str, prefix: str) -> State:
    """Give this project's names to the tensors of MODULES and, after `prefix`, of the encoder in this layout."""
    modules = {theirs.format(i=i, n=i + 1): own.format(i=i) for theirs, own in MODULES.items() for i in range(4)}
    renamed = {}
    for key, value in state_dict.items():
        module, step, kind = re.fullmatch(r"(.*?)(\.conv|\.batch_norm)?\.?(\w*)", key).groups()
        if module in modules:
            key = modules[module] + {".conv": ".0.", ".batch_norm": ".1.", None: "."}[step] + kind
        elif name := _rename(key, layout, "native"):
            key, value = prefix + name, _native_shape(name, value)
        renamed[key] = value
    return renamed


def upernet_names(state_dict: State) -> State:
    """Rename the tensors of transformers' UPerNet as in `segment.UPerNet`; leave others as they are."""
    is_upernet = "decode_head.psp_modules.0.1.conv.weight" in state_dict
    return _own_modules(state_dict, "hf", "encoder.") if is_upernet else state_dict


def _own_detector(state_dict: State, meta: dict) -> dict:
    """Convert mmdetection's Mask R-CNN to a checkpoint of detect.py, with the flags of the released configurations.

    The background is the last of K + 1 classes there and the first here, where it also has boxes and masks, unused.
    """
    tensors = _own_modules(state_dict, "mmpretrain", "backbone.encoder.")
    for name, value in tensors.items():
        if ".cls_score." in name:
            tensors[name] = value.roll(1, dims=0)  # (K + 1, ...)
        elif ".box_predictor.bbox_pred." in name:
            tensors[name] = torch.cat([torch.zeros_like(value[:4]), value])  # (4 K, ...) -> (4 (K + 1), ...)
        elif ".mask_fcn_logits." in name:
            tensors[name] = torch.cat([torch.zeros_like(value[:1]), value])  # (K, ...) -> (K + 1, ...)
    widths = dict(fpn_dim="rpn.head.conv.0.0", box_dim="roi_heads.box_head.fc6", mask_dim="roi_heads.mask_head.0.0")
    config = _flags_of(to_native(tensors)) | {flag: len(tensors[f"{name}.weight"]) for flag, name in widths.items()}
    config |= dict(masks=True, anchor_scale=8.0, group_norm=False, published_heads=True, nms="soft")
    config |= dict(proposals=[1000, 1000], statistics="folder", test_size=[800, 1333])

    categories = enumerate(MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"])
    coco = {name: number for number, name in categories if name not in ("__background__", "N/A")}
    meta = meta.get("dataset_meta") or meta
    classes = list(meta.get("classes") or meta.get("CLASSES") or coco)
    numbers = [coco[name] for name in classes] if set(classes) <= set(coco) else list(range(1, len(classes) + 1))
    return {"model": tensors, "classes": classes, "category_ids": numbers, "config": config}


# --- export -----------------------------------------------------------------------------------------------------------


def write_folder(directory: Path, native: State, layout: str, config: dict, classes: list[str] | None) -> None:
    """Write a folder for "hf"'s from_pretrained or "timm"'s local-dir:, which prepares images as a run's `config` says.

    An encoder gets a final norm with weight one and bias zero.
    """
    import data  # not at the top, since converting does not need it

    depths, dims, version, count, channels, stride = architecture(native).values()
    names = classes if classes and len(classes) == count else [f"class {k}" for k in range(count)]
    mean, std = data.STATISTICS.get(config.get("data_set"), data.STATISTICS["folder"])
    size, crop, v2 = config.get("input_size", 224), config.get("crop_pct"), "v2" * (version == 2)
    side, square = data.short_side(size, crop), dict(height=size, width=size)  # no side: warped to the square
    base = "atto" if dims[0] < SIZES["tiny"][1][0] else "tiny"  # sets the kind of MLP; model_args has the sizes
    timm = dict(
        architecture=f"convnext{v2}_{base}", num_classes=len(names),
        model_args=dict(depths=depths, dims=dims, patch_size=stride),
        pretrained_cfg=dict(
            input_size=[channels, size, size], crop_pct=crop or 0.875 if side else 1.0, interpolation="bicubic",
            crop_mode="center" if side else "squash", mean=mean, std=std, num_classes=len(names), label_names=names,
            first_conv="stem.0", classifier="head.fc",
        ),
    )  # fmt: skip
    hf = dict(
        model_type=f"convnext{v2}", depths=depths, hidden_sizes=dims, patch_size=stride, num_channels=channels,
        architectures=[f"ConvNext{v2.upper()}{'ForImageClassification' if names else 'Model'}"], image_size=size,
        layer_norm_eps=1e-6, id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)},
    )  # fmt: skip
    processor = dict(
        image_processor_type="BitImageProcessor", size=dict(shortest_edge=side) if side else square,
        do_center_crop=bool(side), crop_size=square, image_mean=mean, image_std=std, resample=3,
    )  # fmt: skip
    norm = {"norm.weight": torch.ones(dims[-1]), "norm.bias": torch.zeros(dims[-1])}
    write_file(directory / "model.safetensors", from_native(norm | native, layout))
    files.save_json(directory / "config.json", timm if layout == "timm" else hf)
    if layout == "hf":
        files.save_json(directory / "preprocessor_config.json", processor)


def export(path: Path, net: ConvNeXt, size: int) -> None:
    """Write a program for any number of square images: .onnx, or torch.export's .pt2."""
    images, batch = (torch.randn(2, net.in_chans, size, size),), ({0: torch.export.Dim("batch")},)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(net, images, dynamic_shapes=batch), path)
    else:
        large = sum(p.nbytes for p in net.parameters()) > 2**30  # protocol buffers hold at most 2 GiB
        names = dict(input_names=["images"], output_names=["logits" if net.num_classes else "features"])
        torch.onnx.export(net, images, path, dynamo=True, dynamic_shapes=batch, external_data=large, **names)


# --- command line -----------------------------------------------------------------------------------------------------

# What the command can write: layout -> the key under which its library saves the tensors.
TOP = {"native": "model", "authors": "model", "mmpretrain": "state_dict", "timm": None, "hf": None}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. The description shows the usage, so that errors take one line."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="\n\n".join(__doc__.split("\n\n")[:2]))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("input", metavar="IN", help="weights to read, in any known layout: a file, run or address")
    out = "file to write: .pth, .pt, .bin, .safetensors; .onnx or .pt2; or, of timm and hf, a folder"
    parser.add_argument("output", metavar="OUT", type=Path, help=out)
    parser.add_argument("--to", choices=TOP, help="layout to write; .onnx and .pt2 have none")
    parser.add_argument("--model_ema", action="store_true", help="take a checkpoint's averaged weights")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Convert a file, and print what was recognised and written."""
    out, suffix = args.output, args.output.suffix
    program, folder = suffix in (".onnx", ".pt2"), not suffix and args.to in ("timm", "hf")
    if program == bool(args.to) or not (program or folder or suffix in (".pth", ".pt", ".bin", ".safetensors")):
        ends = "end in .pth, .pt, .bin or .safetensors, or name a folder for timm and hf, with --to"
        raise UserError(f"OUT {out} must {ends}; or end in .onnx or .pt2, without")
    source = files.file_of_run(args.input, "checkpoint-best.pth", "encoder.pth", "newest")
    state_dict, content = read_file(source, args.model_ema), read_content(source)
    if out.exists() and out.samefile(source):
        raise UserError(f"OUT {out} is IN itself, which is never overwritten; choose another name")
    print(f"{source}: {describe(state_dict)}")
    native, config = to_native(state_dict), read_config(source)
    size, stride = config.get("input_size", 224), architecture(native)["stem_stride"]
    if args.to == "timm" and stride == 2:
        raise UserError("timm's ConvNeXt with a stem of stride 2 downsamples once more than ours; try --to hf")
    net = build(native).eval()  # checks that nothing is missing
    if program:
        export(out, net, size)
    elif folder:
        write_folder(out, native, args.to, config, content.get("classes"))
    else:
        write_file(out, from_native(native, args.to), TOP[args.to])
    kind = f"{args.to} {'folder' if folder else 'layout'}" if args.to else f"a program for {size} px"
    needs = f"; its network is made with patch_size={stride}" if args.to in ("timm", "hf") and stride != 4 else ""
    print(f"{out}: {kind}, {len(native)} tensors{needs}")


if __name__ == "__main__":
    main(get_args())
