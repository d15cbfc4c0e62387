"""wa.convert skips prediction layers in the models of torchvision, segmentation-models-pytorch and transformers."""

import copy

import pytest
import segmentation_models_pytorch as smp
import torch
import transformers as hf
from torch import nn
from torchvision.models import detection, segmentation

import weightalign_cuda as wa

NONE = {"weights": None, "weights_backbone": None, "num_classes": 5}


def stays_plain(model):
    """The names of convolutions that `convert` skips. On the meta device: nothing is computed."""
    wa.convert(model)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, convolutions) and not isinstance(module, wa.nn.layers.Aligned)
    ]


RPN = ("rpn.head.cls_logits", "rpn.head.bbox_pred")
RETINA = ("head.classification_head.cls_logits", "head.regression_head.bbox_reg")


def ssd(count, end=""):
    heads = ("classification", "regression")
    return tuple(f"head.{head}_head.module_list.{i}{end}" for head in heads for i in range(count))


TORCHVISION = {
    "RetinaNet": (detection.retinanet_resnet50_fpn, RETINA),
    "RetinaNet v2": (detection.retinanet_resnet50_fpn_v2, RETINA),
    "FCOS": (detection.fcos_resnet50_fpn, (*RETINA, "head.regression_head.bbox_ctrness")),
    "SSD": (detection.ssd300_vgg16, ssd(6)),
    "SSDlite": (detection.ssdlite320_mobilenet_v3_large, ssd(6, ".1")),
    "Faster R-CNN": (detection.fasterrcnn_resnet50_fpn_v2, RPN),
    "Mask R-CNN": (detection.maskrcnn_resnet50_fpn_v2, (*RPN, "roi_heads.mask_predictor.mask_fcn_logits")),
    "Keypoint R-CNN": (detection.keypointrcnn_resnet50_fpn, (*RPN, "roi_heads.keypoint_predictor.kps_score_lowres")),
    "DeepLab": (segmentation.deeplabv3_resnet50, ("classifier.4", "aux_classifier.4")),
    "FCN": (segmentation.fcn_resnet50, ("classifier.4", "aux_classifier.4")),
    "LR-ASPP": (
        segmentation.lraspp_mobilenet_v3_large,
        ("classifier.low_classifier", "classifier.high_classifier"),
    ),
}


@pytest.mark.parametrize(("make", "plain"), TORCHVISION.values(), ids=TORCHVISION)
def test_torchvision(make, plain):
    auxiliary = {"aux_loss": True} if "aux_classifier.4" in plain else {}
    with torch.device("meta"):
        model = make(**NONE, **auxiliary)
    assert stays_plain(model) == list(plain)


@pytest.mark.parametrize("name", ["Unet", "FPN", "DeepLabV3Plus", "PSPNet", "Segformer"])
def test_segmentation_models_pytorch(name):
    with torch.device("meta"):
        model = getattr(smp, name)("resnet18", encoder_weights=None, classes=3, aux_params={"classes": 4})
    assert stays_plain(model) == ["segmentation_head.0"]


def test_dpt_of_segmentation_models_pytorch():
    with torch.device("meta"):
        model = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None)
    assert stays_plain(model) == ["segmentation_head.head.4"]


VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
FUSION = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
LEVELS = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
STAGES = {"out_features": [f"stage{i}" for i in range(1, 5)]}
RESNET = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", **STAGES)
DINO = hf.Dinov2Config(**VIT, **STAGES, reshape_hidden_states=False)
SMALLEST = hf.VitPoseBackboneConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
BOTH = ("decode_head.classifier", "auxiliary_head.classifier")

TRANSFORMERS = {
    "Segformer": (lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**LEVELS)), BOTH[:1]),
    "UperNet": (
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(backbone_config=RESNET, hidden_size=16, auxiliary_in_channels=16)
        ),
        BOTH,
    ),
    "BEiT": (lambda: hf.BeitForSemanticSegmentation(hf.BeitConfig(**VIT, out_indices=[1, 2, 3, 4])), BOTH),
    "DPT": (
        lambda: hf.DPTForSemanticSegmentation(hf.DPTConfig(**VIT, **FUSION, backbone_out_indices=[0, 1, 2, 3])),
        ("head.head.4", "auxiliary_head.head.4"),
    ),
    "DPT's depth": (
        lambda: hf.DPTForDepthEstimation(hf.DPTConfig(**VIT, **FUSION, backbone_out_indices=[0, 1, 2, 3])),
        ("head.head.4",),
    ),
    "GLPN": (lambda: hf.GLPNForDepthEstimation(hf.GLPNConfig(**LEVELS)), ("head.head.2",)),
    "Depth Anything": (
        lambda: hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=DINO,
                reassemble_hidden_size=16,
                **FUSION,
            )
        ),
        ("head.conv3",),
    ),
    "MobileNetV2": (
        lambda: hf.MobileNetV2ForSemanticSegmentation(hf.MobileNetV2Config()),
        ("segmentation_head.classifier.convolution",),
    ),
    "SuperPoint": (
        lambda: hf.SuperPointForKeypointDetection(hf.SuperPointConfig()),
        ("keypoint_decoder.conv_score_b", "descriptor_decoder.conv_descriptor_b"),
    ),
    "ViTPose": (
        lambda: hf.VitPoseForPoseEstimation(hf.VitPoseConfig(backbone_config=SMALLEST)),
        ("head.conv",),
    ),
}


@pytest.mark.parametrize(("make", "plain"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformers(make, plain):
    with torch.device("meta"):
        model = make()
    assert stays_plain(model) == list(plain)


def test_losses_of_retinanet():
    """The classification loss starts where its bias puts it, at 0.25 * -log(0.01) per box; the logits' own spread,
    about 1, changes that by 10 %. The box loss, a sum of four, gains at most 4 * E|N(0, 1)| = 3.2 in the same way.
    Aligned, the last layers would give ten times that, and losses of 9."""
    torch.manual_seed(0)
    layers = {"norm_layer": nn.BatchNorm2d, "trainable_layers": 5}  # as retinanet_resnet50_fpn does without weights
    backbone = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, **layers)
    plain = detection.RetinaNet(backbone, 5, min_size=64, max_size=64)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    boxes = torch.tensor([[[10.0, 10.0, 50.0, 60.0]], [[20.0, 5.0, 60.0, 45.0]]])
    targets = [{"boxes": box, "labels": torch.tensor([label])} for box, label in zip(boxes, (1, 3), strict=True)]

    def losses(model):
        return {name: loss.item() for name, loss in model(images, targets).items()}

    before, after = losses(plain), losses(wa.convert(copy.deepcopy(plain)))
    assert before["classification"] == pytest.approx(0.25 * 4.605, rel=0.05)
    assert after["classification"] == pytest.approx(before["classification"], rel=0.1)
    assert after["bbox_regression"] <= before["bbox_regression"] + 4
