"""Claims about wrong input: exit status 2, one line on standard error that names the value and the fix, and nothing left behind.

A row of `TABLE` is script and name -> the command line, run in the folder `things`, and words that must stand in the line.
"""

import os
import shlex
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from helpers import TINY, Code, save_noise
from PIL import Image

import analyze
import bench
import data
import detect
import finetune
import pretrain
import segment
import weights
from fcmae import FCMAE
from model import ConvNeXt
from plumbing.processes import TORCHRUN_VARIABLES
from plumbing.script import run_script

SCRIPTS = {"pretrain": pretrain, "finetune": finetune, "detect": detect, "segment": segment}
SCRIPTS |= {"analyze": analyze, "weights": weights, "bench": bench}
SMALL = "--input_size 16 --stem_stride 1 --epochs 2 --num_workers 0"
LONG = "x" * 300  # longer than a file name may be

TABLE = {
    # --- paths and folders
    "pretrain: folder missing": ("--data_path nowhere", "nowhere does not exist; give a folder"),
    "pretrain: folder is a file": ("--data_path picture.png", "picture.png is not a directory; give a folder"),
    "pretrain: folder without images": ("--data_path empty", "no images under empty; files must end in", "convert others, such as HEIC, to JPEG"),
    "pretrain: folder of other files": ("--data_path other", "no images under other, but 2 .heic, 1 .mov; files must end in", "HEIC, to JPEG"),
    "pretrain: folder of a name too long": (f"--data_path {LONG}", "does not exist; give a folder"),
    "pretrain: loop of links": ("--data_path loop", "no images under loop"),
    "pretrain: val without train": ("--data_path onlyval", "onlyval has a folder val and none named train; add onlyval/train"),
    "pretrain: empty variable": ("--data_path ''", "--data_path has an empty value; was a shell variable not set?"),
    "pretrain: empty variable after =": ("--data_path=", "--data_path has an empty value; was a shell variable not set?"),
    "pretrain: output is a file": ("--output_dir picture.png", "cannot write to --output_dir picture.png", "choose another"),
    "pretrain: output below a file": ("--output_dir picture.png/deep/er", "cannot write to --output_dir picture.png/deep/er"),
    "pretrain: output cannot be made": ("--output_dir /proc/nowhere", "cannot write to --output_dir /proc/nowhere"),
    "pretrain: output of a name too long": (f"--output_dir new/{LONG}", "File name too long", "choose another"),
    "finetune: no folder": ("--data_set folder", "--data_set folder needs --data_path DIR"),
    "finetune: folder without classes": ("--data_path pictures", "pictures has no train/<class>/ folders", "--holdout 0.2"),
    "finetune: folder without classes held out": ("--data_path pictures --holdout 0.4", "lies in no class folder, and labels"),
    "finetune: two sources of validation": ("--holdout 0.4 --eval_data_path labelled/val", "--holdout 0.4 contradicts --eval_data_path"),
    "finetune: images beside class folders": ("--data_path stray", "stray/train/loose.png lies in no class folder, and labels", "<class>"),
    "finetune: val without train": ("--data_path onlyval", "onlyval has a folder val and none named train"),
    "finetune: train without val": ("--data_path onlytrain", "onlytrain has a folder train and none named val", "--eval_data_path, or train with --holdout 0.2"),
    "finetune: train and test without val": ("--data_path withtest", "none named val", "--eval_data_path withtest/test, or train with --holdout"),
    "finetune: class lacks in val": ("--data_path lacking", "lack the class b (1 in all); training and validation folders must agree"),
    "finetune: class unknown in train": ("--data_path extra", "have an unknown class c (1 in all)"),
    "finetune: class folder without images": ("--data_path emptyclass", "have an unknown class b (1 in all)"),
    "finetune: validation folder missing": ("--eval_data_path nowhere", "nowhere does not exist"),
    "finetune: validation folder alone": ("--data_set folder --eval_data_path labelled/val", "give --data_path DIR, or --eval"),
    "finetune: output is a file": ("--output_dir picture.png", "cannot write to --output_dir picture.png"),
    "finetune: predict nothing there": ("--predict nowhere.jpg --resume tiny.pth", "--predict nowhere.jpg does not exist; give"),
    "finetune: predict more than there is": ("--predict picture.png --resume tiny.pth --topk 99", "--topk 99 is more than the", "classes of tiny.pth; lower it"),
    "finetune: predict no class": ("--predict picture.png --resume tiny.pth --topk 0", "--topk: 0 must be at least 1"),
    "finetune: predict an empty folder": ("--predict empty --resume tiny.pth", "no images under empty; give others"),
    "analyze: folder missing": ("collapse --data_path nowhere", "nowhere does not exist"),
    "analyze: unlabelled": ("selectivity --data_path pictures", "selectivity needs labels, and pictures has none; arrange"),
    "analyze: one class": ("selectivity --data_path oneclass", "1 class among the images", "more classes"),
    "analyze: no training split": ("embed --data_path pictures", "pictures has no val; arrange"),
    "analyze: other classes in val": ("embed --data_path lacking", "class folders in lacking/train and lacking/val differ"),
    "analyze: no such picture": ("reconstruct --images nowhere.png", "cannot read the image nowhere.png", "give a picture"),
    "analyze: picture is a folder": ("reconstruct --images pictures", "cannot read the image pictures"),
    "analyze: output is a file": ("collapse --output_dir picture.png", "cannot write to --output_dir picture.png"),
    "analyze: run without log": ("curves pictures", "no log.jsonl in pictures; run"),
    "analyze: damaged log": ("curves damagedlog", "log.jsonl or config.json in damagedlog is damaged", "leave that run out"),
    "bench: folder missing": ("data --data_path nowhere", "nowhere does not exist"),
    # --- images
    "pretrain: nothing readable": ("--data_path damaged", "cannot read the image damaged/bomb.png (more than 178,956,970 pixels), nor the 5 others tried under damaged; check files"),
    "pretrain: a bomb alone": ("--data_path bomb", "cannot read the image bomb/bomb.png (more than 178,956,970 pixels); check files and permissions"),
    "finetune: nothing readable": ("--data_path damagedclass", "nor the 5 others tried under damagedclass/train; check"),
    "finetune: nothing readable in val": ("--eval_data_path damagedclass/train", "nor the 5 others tried under damagedclass/train; check"),
    "finetune: predict a text": ("--predict damaged/text.jpg --resume tiny.pth", "cannot read the image damaged/text.jpg (not an image, or of a format", "check files"),
    "finetune: predict nothing readable": ("--predict damaged --resume tiny.pth", "cannot read the image damaged/bomb.png (more than 178,956,970 pixels), nor the 5 others tried under damaged; check"),
    "analyze: a text": ("reconstruct --images damaged/text.jpg", "cannot read the image damaged/text.jpg"),
    "analyze: a bomb": ("activations --images bomb/bomb.png", "cannot read the image bomb/bomb.png (more than 178,956,970 pixels)"),
    "bench: nothing readable": ("data --data_path damaged", "nor the 5 others tried under damaged; check"),
    # --- numbers
    "pretrain: no batch": ("--batch_size 0", "--batch_size: 0 must be at least 1"),
    "pretrain: half a batch": ("--batch_size 1.5", "--batch_size: '1.5' is not a whole number"),
    "pretrain: negative epochs": ("--epochs -3", "--epochs: -3 must be at least 1"),
    "pretrain: epochs beyond counting": ("--epochs 99999999999999999999", "at least 1 and at most 1000000000"),
    "pretrain: learning rate nan": ("--blr nan", "--blr: nan must be more than 0 and finite"),
    "pretrain: learning rate inf": ("--lr inf", "--lr: inf must be more than 0 and finite"),
    "pretrain: learning rate zero": ("--blr 0", "--blr: 0 must be more than 0"),
    "pretrain: learning rate in words": ("--blr small", "--blr: 'small' is not a number"),
    "pretrain: ratio zero": ("--mask_ratio 0", "--mask_ratio: 0 must be more than 0 and less than 1"),
    "pretrain: ratio nan": ("--mask_ratio nan", "--mask_ratio: nan must be more than 0 and less than 1"),
    "pretrain: ratio one": ("--mask_ratio 1", "--mask_ratio: 1 must be more than 0 and less than 1"),
    "pretrain: ratio that leaves nothing": ("--mask_ratio 0.8", "mask_ratio 0.8 leaves no patch visible of 2 x 2", "larger images"),
    "pretrain: one patch": ("--input_size 8", "--input_size 8 is one patch", "try --input_size 32"),
    "pretrain: one patch of a wide stem": ("--stem_stride 2", "--input_size 16 is one patch", "--stem_stride 1 makes 2 x 2 patches of it"),
    "pretrain: size that would be one patch": ("--stem_stride 4", "image size 16 is not a multiple", "try --input_size 64, or --stem_stride 1"),
    "pretrain: size off the grid": ("--input_size 50", "image size 50 is not a multiple of the patch size 8", "try --input_size 48"),
    "pretrain: size negative": ("--input_size -16", "--input_size: -16 must be at least 8 and at most 4096"),
    "pretrain: size too large": ("--input_size 4000000000", "at least 8 and at most 4096"),
    "pretrain: stride": ("--stem_stride 3", "--stem_stride: invalid choice: 3 (choose from"),
    "pretrain: decoder of no width": ("--decoder_embed_dim 0", "--decoder_embed_dim: 0 must be at least 1 and at most 8192"),
    "pretrain: decoder too wide": ("--decoder_embed_dim 1000000", "--decoder_embed_dim: 1000000 must be at least 1 and at most 8192"),
    "pretrain: decoder too deep": ("--decoder_depth 5000", "--decoder_depth: 5000 must be at least 0 and at most 100"),
    "pretrain: negative workers": ("--num_workers -1", "--num_workers: -1 must be at least 0 and at most 1024"),
    "pretrain: negative seed": ("--seed -1", "--seed: -1 must be at least 0 and at most 9223372036854775807"),
    "pretrain: seed too large": ("--seed 9223372036854775808", "--seed: 9223372036854775808 must be at least 0 and at most"),
    "pretrain: weight decay negative": ("--weight_decay -0.1", "--weight_decay: -0.1 must be at least 0"),
    "pretrain: clipping to nothing": ("--clip_grad 0", "--clip_grad: 0 must be more than 0"),
    "finetune: drop path above one": ("--drop_path 1.1", "--drop_path: 1.1 must be at least 0 and at most 1"),
    "finetune: smoothing above one": ("--smoothing 1.5", "--smoothing: 1.5 must be at least 0 and at most 1"),
    "finetune: negative mixup": ("--mixup -0.8", "--mixup: -0.8 must be at least 0 and finite"),
    "finetune: infinite cutmix": ("--cutmix inf", "--cutmix: inf must be at least 0 and finite"),
    "finetune: layer decay zero": ("--layer_decay 0", "--layer_decay: 0 must be more than 0 and at most 1"),
    "finetune: crop that fills the memory": ("--crop_pct 1e-9", "--crop_pct: 1e-9 must be at least 0.1 and at most 1"),
    "finetune: beta of one": ("--opt_betas 0.9 1", "--opt_betas: 1 must be at least 0 and less than 1"),
    "finetune: one beta": ("--opt_betas 0.9", "--opt_betas: expected 2 arguments"),
    "finetune: momentum of one": ("--momentum 1", "--momentum: 1 must be at least 0 and less than 1"),
    "finetune: rectangles": ("--recount 1000000000", "--recount: 1000000000 must be at least 1 and at most 100"),
    "finetune: magnitude": ("--aa rand-m99-n2", "--aa rand-m99-n2 has m (magnitude) 99", "both end at 10"),
    "finetune: augmentation misspelt": ("--aa rand-x9", "no automatic augmentation --aa rand-x9; choose rand-m9"),
    "finetune: augmentation of timm's alone": ("--aa augmix-m5", "no automatic augmentation --aa augmix-m5; choose rand-m9"),
    "finetune: labels": ("--labels_per_class 7", "--labels_per_class 7 is more than the 3 images of class a; lower it"),
    "finetune: classes": ("--nb_classes 1", "--nb_classes 1 is fewer than the 2 classes of the data; leave it out"),
    "finetune: crop of images that are shifted": ("--min_crop 0.5", "--min_crop 0.5 does nothing at --input_size 16", "leave it out"),
    "finetune: image below the patch": ("--stem_stride 4", "image size 16 x 16 is below the patch size 32; enlarge it, or lower --stem_stride"),
    "analyze: size off the grid": ("collapse --input_size 20", "image size 20 is not a multiple of the patch size 8; try --input_size 16"),
    "analyze: more images than there are": ("collapse --num_images 25", "--num_images 25, but folder (val) has 6 images; ask for at most"),
    "analyze: more pictures than given": ("reconstruct --images picture.png --num_images 2", "--images has 1 image; ask for at most"),
    "analyze: ratio above one": ("reconstruct --mask_ratios 0.5,1.5", "1.5 must be more than 0 and less than 1"),
    "analyze: ratio missing": ("reconstruct --mask_ratios 0.5,,0.6", "'' is not a number"),
    "analyze: nothing visible": ("reconstruct --mask_ratio 0.9", "leaves no patch visible of 2 x 2"),
    "analyze: nothing hidden": ("reconstruct --mask_ratio 1e-30", "hides no patch of 2 x 2"),
    "bench: ratio": ("--mask_ratio 2", "--mask_ratio: 2 must be more than 0 and less than 1"),
    "bench: ratio that hides everything": ("--mask_ratio 0.99", "no patch visible"),
    "bench: size off the grid": ("--input_size 50", "image size 50 is not a multiple of the patch size 32", "try --input_size 64"),
    "bench: batches and models": ("--batch_size 1 2 3", "--batch_size has 3 numbers for 2 models; give one"),
    # --- names, and flags that contradict each other
    "pretrain: model misspelt": ("--model convnextv2_ato", "no model 'convnextv2_ato'; did you mean convnextv2_atto?"),
    "pretrain: flag misspelt": ("--epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs?"),
    "pretrain: switch": ("--norm_pix_loss maybe", "--norm_pix_loss maybe: expected true or false"),
    "pretrain: warm-up beyond the end": ("--warmup_epochs 3", "--warmup_epochs 3 is more than --epochs 2; lower it"),
    "pretrain: start beyond the end": ("--start_epoch 2", "--start_epoch 2 leaves nothing of --epochs 2; lower it"),
    "pretrain: two learning rates": ("--lr 1e-3 --blr 1e-3", "--blr: not allowed with argument --lr"),
    "pretrain: rising learning rate": ("--lr 1e-3 --min_lr 1e-2", "--min_lr 0.01 is more than the learning rate 0.001", "lower --min_lr"),
    "pretrain: folder and embedded": ("--data_set embedded --data_path pictures", "embedded takes no --data_path pictures; leave one"),
    "pretrain: folder and drawn images": ("--data_path pictures --embedded_images 5 5", "--embedded_images is of the embedded data", "leave it"),
    "detect: folder and drawn images": ("--data_path coco --embedded_images 5 5", "--embedded_images is of the embedded data", "leave it"),
    "pretrain: no CIFAR there": ("--data_set cifar10 --data_path pictures", "cifar10 is not in pictures", "give its folder as --data_path"),
    "finetune: evaluate without weights": ("--eval", "--eval needs --resume FILE"),
    "finetune: predict without weights": ("--predict picture.png", "--predict needs --resume FILE"),
    "pretrain: hold a folder": ("--data_path pictures --hold_data", "--hold_data needs images that are in memory", "leave it out"),
    "finetune: hold what is jittered": (
        f"--data_set embedded --scratch {SMALL} --color_jitter 0.4 --hold_data", "--hold_data needs images", "no --color_jitter"),
    "finetune: evaluate and predict": ("--eval --predict picture.png --resume tiny.pth", "--eval contradicts --predict; leave one"),
    "finetune: evaluate another model": ("--eval --resume tiny.pth --model convnextv2_tiny", "--model convnextv2_tiny, but tiny.pth has a size"),
    "finetune: evaluate another stem": ("--eval --resume tiny.pth --stem_stride 4", "--stem_stride 4, but tiny.pth has 1; leave --stem_stride out"),
    "finetune: scratch and weights": ("--scratch --finetune tiny.pth", "--scratch contradicts --finetune tiny.pth; leave one of the two out"),
    "finetune: recipe without that size": ("--recipe in22k", "--recipe in22k has no settings for size atto; it has nano"),
    "finetune: probe by a recipe": ("--linear_probe --recipe in1k", "--linear_probe contradicts --recipe in1k; leave one of the two out"),
    "pretrain: batch statistics counted twice": ("--mlp_norm bn --checkpoint_activations", "--mlp_norm bn counts every image twice", "leave one"),
    "finetune: batch statistics counted twice": ("--mlp_norm bn --checkpoint_activations", "--mlp_norm bn counts every image twice", "leave one"),
    "pretrain: LayerScale of V2": ("--layer_scale_init_value 1", "convnextv2_atto has no LayerScale; leave it out, or use --model convnext_*"),
    "finetune: LayerScale of V2": ("--layer_scale_init_value 1", "convnextv2_atto has no LayerScale; leave it out, or use --model convnext_*"),
    "finetune: LayerScale of given weights": (
        "--model convnext_atto --finetune v1.pth --layer_scale_init_value 1", "does nothing to the weights of --finetune v1.pth"),
    "finetune: recipe unknown": ("--recipe in2k", "--recipe: invalid choice: 'in2k' (choose from"),
    "finetune: mixed precision or not": ("--amp none --use_amp true", "--amp none contradicts --use_amp true; leave one"),
    "finetune: two learning rates": ("--blr 1e-3 --lr 1e-3", "--lr: not allowed with argument --blr"),
    "finetune: warm-up beyond the end": ("--warmup_epochs 3", "--warmup_epochs 3 is more than --epochs 2"),
    "analyze: command misspelt": ("colapse", "invalid choice: 'colapse' (choose from"),
    "analyze: labels and checkpoints": ("collapse --label A B", "2 --label for 1 --checkpoint; give one each"),
    "analyze: no such layer": ("activations --layer stages.9.0", "no layer 'stages.9.0'; choose norm, or one of stages.0.0, stages.1.0"),
    "analyze: a kind of layer": ("activations --layer grn", "--layer grn is not a single layer with maps; give one such as"),
    "analyze: GRN of V1": ("grn --checkpoint v1.pth", "v1 has no GRN, as ConvNeXt V1 has none; give a V2 checkpoint"),
    "weights: layout misspelt": ("tiny.pth new.pth --to tim", "no layout 'tim'; did you mean timm?"),
    "weights: no layout": ("tiny.pth new.pth", "the following arguments are required: --to"),
    # --- checkpoints
    "pretrain: resume nothing": ("--resume nowhere.pth", "cannot read nowhere.pth (No such file"),
    "pretrain: resume a folder": ("--resume pictures", "no checkpoint-<epoch>.pth in the folder pictures; name"),
    "pretrain: resume an encoder": ("--resume encoder.pth", "encoder.pth is not a checkpoint-<epoch>.pth of pretrain.py"),
    "pretrain: resume the other stage": ("--resume tuned.pth", "tuned.pth is not a checkpoint-<epoch>.pth of pretrain.py"),
    "finetune: resume the other stage": ("--resume run/checkpoint-3.pth", "not a checkpoint-<epoch>.pth of finetune.py", "--finetune"),
    "finetune: weights missing": ("--finetune nowhere.pth", "cannot read nowhere.pth (No such file"),
    "finetune: weights are a folder": ("--finetune pictures", "no checkpoint-best.pth or encoder.pth or checkpoint-<epoch>.pth in the folder pictures"),
    "finetune: evaluate a folder": ("--eval --resume pictures", "no checkpoint-best.pth or checkpoint-<epoch>.pth in the folder pictures"),
    "finetune: weights are text": ("--finetune damaged/text.pth", "damaged/text.pth is not a readable checkpoint: damaged"),
    "finetune: weights are empty": ("--finetune damaged/empty.pth", "damaged/empty.pth is not a readable checkpoint"),
    "finetune: weights are truncated": ("--finetune damaged/truncated.pth", "damaged/truncated.pth is not a readable checkpoint"),
    "finetune: weights hold code": ("--finetune code.pth", "code.pth is not a readable checkpoint", "code, which is never run"),
    "finetune: weights hold old code": ("--finetune code.pkl", "code.pkl is not a readable checkpoint", "code, which is never run"),
    "finetune: weights are a list": ("--finetune list.pth", "list.pth holds a list, not a checkpoint"),
    "detect: no annotations": ("--data_path labelled", "cannot read the annotations labelled/annotations/instances_train2017.json"),
    "detect: evaluate a classifier": ("--eval --resume tuned.pth", "tuned.pth holds no detector", "train one with detect.py --finetune tuned.pth"),
    "detect: evaluate a segmenter": ("--eval --resume segmenter.pth", "segmenter.pth holds no detector", "detect.py --finetune segmenter.pth"),
    "detect: evaluate an altered detector": ("--eval --resume ours.pth", "ours.pth and the network that it describes differ in", "incomplete or altered"),
    "segment: evaluate an altered segmenter": ("--eval --resume segmenter.pth", "describes differ in", "incomplete or altered"),
    "detect: evaluate without a checkpoint": ("--eval", "--eval needs --resume FILE"),
    "segment: no label maps": ("--data_path labelled", "labelled/images/training"),
    "segment: evaluate a classifier": ("--eval --resume tuned.pth", "tuned.pth holds no segmenter", "segment.py --finetune tuned.pth"),
    "segment: evaluate a detector": ("--eval --resume ours.pth", "ours.pth holds no segmenter", "segment.py --finetune ours.pth"),
    "finetune: weights of a detector": ("--finetune detector.pth", "no part of a ConvNeXt", "give the classifier or encoder it was built on"),
    "finetune: weights of no known layout": ("--finetune resnet.pth", "no layout is known for these 2 tensors (conv1.weight, fc.weight)"),
    "finetune: weights of scalars": ("--finetune scalars.pth", "stages.0.0.dwconv.weight of shape () cannot be"),
    "finetune: weights of another size": ("--finetune tiny.pth --model convnextv2_atto", "do not fit the model", "the model is convnextv2_atto"),
    "finetune: weights of another stem": ("--finetune stride4.pth", "the weights have stem_stride 4 and the model 1", "use --stem_stride 4"),
    "finetune: safetensors broken": ("--finetune damaged/text.safetensors", "text.safetensors is not a readable safetensors file"),
    "finetune: evaluate an encoder": ("--eval --resume encoder.pth", "encoder.pth holds no classifier but an encoder; train one"),
    "finetune: evaluate pre-training": ("--eval --resume run/checkpoint-3.pth", "holds no classifier but an encoder; train one"),
    "finetune: evaluate grey": ("--eval --resume grey.pth", "grey.pth takes images of 1 channels; images here have 3"),
    "finetune: evaluate on other classes": ("--eval --resume tiny.pth --data_path three", "tiny.pth has 2 classes, the validation images 3"),
    "finetune: evaluate other names": ("--eval --resume tuned.pth", "the validation images lack the class x"),
    "analyze: no checkpoint": ("reconstruct --checkpoint nowhere", "no checkpoint nowhere; run `python pretrain.py` first"),
    "analyze: folder without checkpoint": ("collapse --checkpoint pictures", "no checkpoint-best.pth or checkpoint-<epoch>.pth or encoder.pth in the folder pictures"),
    "analyze: name too long": (f"collapse --checkpoint {LONG}", "no checkpoint xxx", "run `python pretrain.py` first"),
    "analyze: a picture as checkpoint": ("collapse --checkpoint picture.png", "picture.png is not a readable checkpoint"),
    "analyze: code": ("collapse --checkpoint code.pth", "code.pth is not a readable checkpoint"),
    "analyze: no decoder": ("reconstruct --checkpoint encoder.pth", "encoder.pth holds no decoder, which reconstructing needs; give"),
    "analyze: grey": ("collapse --checkpoint grey.pth", "grey takes images of 1 channels"),
    "weights: nothing to read": ("nowhere.pth new.pth --to timm", "cannot read nowhere.pth (No such file"),
    "weights: a folder": ("pictures new.pth --to timm", "cannot read pictures (Is a directory)"),
    "weights: code": ("code.pth new.pth --to timm", "code.pth is not a readable checkpoint"),
    "weights: incomplete": ("incomplete.pth new.pth --to timm", "norm.bias", "incomplete or altered"),
    "weights: no average": ("tiny.pth new.pth --to timm --model_ema", "tiny.pth holds no averaged weights", "without --model_ema"),
    "weights: safetensors missing": ("nowhere.safetensors new.pth --to timm", "nowhere.safetensors"),
    "weights: safetensors folder": ("folder.safetensors new.pth --to timm", "folder.safetensors"),
    "weights: no folder to write to": ("tiny.pth nowhere/new.pth --to timm", "cannot write nowhere/new.pth"),
    "weights: below a file": ("tiny.pth picture.png/new.safetensors --to timm", "cannot write picture.png/new.safetensors"),
    "weights: onto a folder": ("tiny.pth folder.safetensors --to timm", "cannot write folder.safetensors (Is a directory)"),
    "weights: unknown format": ("tiny.pth new.onnx --to timm", "OUT new.onnx must end in .pth, .pt, .bin or .safetensors"),
    "weights: onto itself": ("tiny.pth ./tiny.pth --to timm", "OUT tiny.pth is IN itself, which is never overwritten; choose another"),
    "weights: onto itself by a link": ("tiny.pth link.pth --to timm", "OUT link.pth is IN itself, which is never overwritten"),
    "weights: name too long": (f"tiny.pth {LONG}.pth --to timm", "cannot write xxx"),
    # --- devices
    "pretrain: no such device": ("--device tpu9", "--device tpu9 cannot be used here", "try --device cpu"),
    "pretrain: no such GPU": ("--device cuda:99", "--device cuda:99 cannot be used here", "try --device cpu"),
    "pretrain: a device without numbers": ("--device meta", "--device meta cannot be used here (neither cuda, cpu nor mps)", "try --device cpu"),
    "bench: no such device": ("--device gpu", "--device gpu is no device of torch's; did you mean cuda?"),
    "finetune: no MPS": ("--device mps", "--device mps cannot be used here (this machine or this torch has no MPS)", "try --device cpu"),
}  # fmt: skip

# Variables that torchrun sets; PORT is one on which somebody listens.
ENVIRONMENT = {
    "one alone": ("RANK=1", "WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR not set though RANK is; unset it"),
    "half of them": ("WORLD_SIZE=2 MASTER_PORT=29500", "RANK, LOCAL_RANK, MASTER_ADDR not set though WORLD_SIZE is"),
    "rank beyond the size": ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=29500", "RANK=2 is not below WORLD_SIZE=2"),
    "rank in words": ("RANK=one WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=29500", "RANK=one is not a whole number"),
    "negative rank": ("RANK=-1 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=29500", "RANK=-1 is not a whole number"),
    "no process here": ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=0 LOCAL_WORLD_SIZE=", "LOCAL_WORLD_SIZE= is"),
    "port taken": ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=PORT", "MASTER_PORT=PORT cannot be used", "another"),
    "no such port": ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=99999", "MASTER_PORT=99999 cannot be used"),
}  # fmt: skip


def bomb(path: Path):
    """A PNG of a few bytes that declares 30000 x 30000 pixels."""
    Image.new("1", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (30000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.fixture(scope="session")
def things(tmp_path_factory) -> Path:
    """Folders, pictures and checkpoints, good and bad."""
    root = tmp_path_factory.mktemp("things")
    for folder in (
        "pictures", "labelled/train/a", "labelled/train/b", "labelled/val/a", "labelled/val/b", "onlyval/val/a", "onlytrain/train/a", "withtest/train/a", "withtest/test/a",
        "stray/train/a", "lacking/train/a", "lacking/train/b", "lacking/val/a", "extra/train/a", "extra/val/a", "extra/val/c",
        "emptyclass/train/a", "emptyclass/val/a", "emptyclass/val/b", "oneclass/train/a", "oneclass/val/a",
        "three/val/a", "three/val/b", "three/val/c",
    ):  # fmt: skip
        for k, size in enumerate((16, 20, 16)):
            save_noise(root / folder / f"{k}.png", (size, size))
    save_noise(root / "picture.png", (16, 16))
    save_noise(root / "stray/train/loose.png", (16, 16))
    for folder in (
        "empty",
        "other",
        "loop",
        "bomb",
        "damaged",
        "damagedclass/train/a",
        "emptyclass/train/b",
        "damagedlog",
        "folder.safetensors",
    ):
        (root / folder).mkdir(parents=True)
    (root / "loop/again").symlink_to(root / "loop")
    (root / "loop/itself").symlink_to(root / "loop/itself")
    bomb(root / "bomb/bomb.png")
    bomb(root / "damaged/bomb.png")
    os.mkfifo(root / "damaged/pipe.png")
    (root / "damaged/dangling.png").symlink_to(root / "nowhere.png")
    (root / "damaged/zero.jpg").write_bytes(b"")
    (root / "damaged/text.jpg").write_text("hello")
    (root / "damaged/truncated.png").write_bytes((root / "picture.png").read_bytes()[:200])
    for path in [path for path in (root / "damaged").iterdir() if path.suffix in (".jpg", ".png")]:
        (root / "damagedclass/train/a" / path.name).symlink_to(path)
    for name in ("a.heic", "b.HEIC", "c.mov", ".hidden", "Thumbs.db", "._a.jpg"):
        (root / "other" / name).write_text("no image")
    (root / "emptyclass/train/b/note.txt").write_text("no image")
    (root / "damagedlog/log.jsonl").write_text('{"epoch": 1, "lo\n')

    torch.manual_seed(0)
    config = dict(data_set="folder", data_path="labelled", input_size=16, stem_stride=1, mask_ratio=0.5, images=6)
    encoder, tiny = ConvNeXt(**TINY, num_classes=0, stem_stride=1), ConvNeXt(**TINY, num_classes=2, stem_stride=1)
    state = tiny.state_dict()
    (root / "run").mkdir()
    contents = {
        "run/checkpoint-3.pth": {"model": FCMAE(encoder, decoder_embed_dim=16).state_dict(), "stage": "pretrain.py", "config": config},
        "encoder.pth": {"model": encoder.state_dict(), "config": config},
        "tiny.pth": {"model": state, "config": {"data_set": "somebody's", "input_size": [3, 16, 16]}},
        "tuned.pth": {"model": state, "stage": "finetune.py", "config": config, "classes": ["a", "x"]},
        "grey.pth": ConvNeXt(**TINY, num_classes=2, in_chans=1, stem_stride=1).state_dict(),
        "stride4.pth": ConvNeXt(**TINY, num_classes=2, stem_stride=4).state_dict(),
        "v1.pth": ConvNeXt(**TINY, num_classes=0, version=1, stem_stride=1).state_dict(),
        "incomplete.pth": {key: value for key, value in state.items() if key != "norm.bias"},
        "scalars.pth": state | {"stages.0.0.dwconv.weight": torch.tensor(1.0)},
        "detector.pth": {f"backbone.{key}": value for key, value in encoder.state_dict().items()} | {"rpn_head.conv.weight": torch.ones(1)},
        "ours.pth": {"model": {"rpn.head.weight": torch.ones(1)}, "classes": ["a"], "category_ids": [1], "config": {}},
        "segmenter.pth": {"model": {"fuse.0.weight": torch.ones(1)}, "classes": ["a"], "colours": [[0, 0, 0]], "config": {}},
        "resnet.pth": {"conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)},
        "list.pth": [1, 2],
        "code.pth": {"model": state, "code": Code()},
    }  # fmt: skip
    for name, content in contents.items():
        torch.save(content, root / name)
    torch.save({"model": state, "code": Code()}, root / "code.pkl", _use_new_zipfile_serialization=False)
    (root / "link.pth").symlink_to(root / "tiny.pth")
    (root / "damaged/truncated.pth").write_bytes((root / "tiny.pth").read_bytes()[:5000])
    (root / "damaged/empty.pth").write_bytes(b"")
    for name in ("text.pth", "text.safetensors"):
        (root / "damaged" / name).write_text("hello")
    return root


@pytest.fixture
def place(things, monkeypatch) -> Path:
    """The folder `things`, as the working directory; nothing in it may change, and no download succeeds."""
    monkeypatch.chdir(things)
    for name in (*TORCHRUN_VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def refuse(self):
        raise OSError("no network")

    monkeypatch.setattr(data.datasets.CIFAR10, "download", refuse)
    before = contents(things)
    yield things
    assert contents(things) == before


def contents(folder: Path) -> dict:
    """Every file and folder below, with its size and time of change."""
    return {path: (path.lstat().st_size, path.is_dir() or path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def command(script: str, words: str) -> list[str]:
    """The words, after flags that the row needs and does not give itself: later ones win."""
    given, base = shlex.split(words), []
    if script == "weights":
        return given
    if script == "analyze":
        base = ["--output_dir", "new/out"]
        base += ["--device", "cpu", *(() if "--checkpoint" in given else ("--checkpoint", "run"))] if given[0] != "curves" else []
        return [given[0], *base, *given[1:]]
    base = ["--device", "cpu", "--output_dir", "new/out"]
    if script == "pretrain":
        base += [*SMALL.split(), "--decoder_embed_dim", "16"]
    elif script == "finetune" and not {"--eval", "--predict"} & set(given):
        base += [*SMALL.split(), "--model", "convnextv2_atto"]
    if script in ("pretrain", "finetune") and not any(word.startswith(("--data_path", "--data_set")) for word in given):
        base += ["--data_path", "pictures" if script == "pretrain" else "labelled"]
    return [*given[:1], *base, *given[1:]] if script == "bench" and not words.startswith("--") else [*base, *given]


def the_line(script: str, argv: list[str], capfd, monkeypatch) -> str:
    """What the script writes to standard error, once it is one line and the exit status 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as exit:
        run_script(SCRIPTS[script].main, lambda: SCRIPTS[script].get_args(argv))
    error = capfd.readouterr().err
    assert exit.value.code == 2 and error.startswith(f"{script}.py: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("name", TABLE)
def test_wrong_input_is_one_line_and_status_2(name, place, capfd, monkeypatch):
    script, (words, *expected) = name.split(":")[0], TABLE[name]
    line = the_line(script, command(script, words), capfd, monkeypatch)
    assert all(part in line for part in expected), line


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_wrong_variables_of_torchrun_are_one_line_and_status_2(name, place, capfd, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        words, *expected = (text.replace("PORT=PORT", f"PORT={taken.getsockname()[1]}") for text in ENVIRONMENT[name])
        for word in words.split():
            monkeypatch.setenv(*word.split("="))
        line = the_line("pretrain", command("pretrain", ""), capfd, monkeypatch)
    assert all(part in line for part in expected), line


def test_more_processes_than_gpus_are_one_line(place, capfd, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)  # as if there were a GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in zip(TORCHRUN_VARIABLES, ("1", "2", "1", "29500", "localhost")):
        monkeypatch.setenv(name, value)
    line = the_line("pretrain", command("pretrain", "--device cuda"), capfd, monkeypatch)
    assert "process 1 has no GPU: 1 here; lower torchrun's --nproc_per_node" in line


def test_processes_that_cannot_meet_are_one_line(place, capfd, monkeypatch):
    def fail(*args, **_):
        raise torch.distributed.DistNetworkError("timed out\nbecause of a wall")

    monkeypatch.setattr(torch.distributed, "rendezvous", fail)
    for name, value in zip(TORCHRUN_VARIABLES, ("1", "2", "1", "29500", "far")):
        monkeypatch.setenv(name, value)
    line = the_line("pretrain", command("pretrain", ""), capfd, monkeypatch)
    assert "process 1 cannot meet the others at far:29500 (timed out)" in line


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 1")]
)
def test_too_little_memory_is_one_line(place, capfd, monkeypatch, error):
    def fail(*args, **_):
        raise error

    monkeypatch.setattr(pretrain, "make_autoencoder", fail)
    assert "out of memory; lower --batch_size" in the_line("pretrain", command("pretrain", ""), capfd, monkeypatch)


def test_errors_of_the_code_itself_keep_their_traceback(place, monkeypatch):
    def fail(*args, **_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pretrain, "make_autoencoder", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        run_script(pretrain.main, lambda: pretrain.get_args(command("pretrain", "")))


@pytest.mark.parametrize(
    ("script", "words", "variables", "expected"),
    [
        ("pretrain", "--data_path bomb", "", "cannot read the image"),
        ("finetune", "--finetune code.pth", "", "code, which is never run"),
        ("weights", "damaged/text.pth new.pth --to timm", "RANK=nonsense", "text.pth is not a readable checkpoint"),
    ],
)
def test_wrong_input_is_one_line_from_the_shell_too(place, script, words, variables, expected):
    argv = [sys.executable, Path(pretrain.__file__).parent / f"{script}.py", *command(script, words)]
    environment = os.environ | dict(word.split("=") for word in variables.split())
    result = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (2, "") and expected in result.stderr and result.stderr.count("\n") == 1, (
        result.stderr
    )
