"""Prediction layers: their outputs are logits, boxes or masks, at a scale that alignment would remove.

Matched by name, so that their libraries need not be imported. In each module the last layer predicts; the hidden layers
of a head, its tower, do not.
"""

import fnmatch
from collections.abc import Container, Iterable, Iterator, Sequence

from torch import nn

# Attribute names of modules in their parents.
_NAMES = (
    *("*classifier", "*predictor", "*segmentation_head"),  # many libraries; segmentation-models-pytorch
    *("cls_logits", "bbox_reg", "bbox_ctrness", "mask_fcn_logits"),  # torchvision
    *("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas"),  # detectron2
    *("*_cls", "*_reg", "*_obj", "*_centerness", "convs_pred"),  # OpenMMLab
    *("conv_logits", "conv_seg", "heatmap_head", "wh_head", "offset_head"),
    *("cls_preds", "reg_preds", "obj_preds", "seg_layers"),  # YOLOX and YOLOv6; nnU-Net
)
# Class names, and which of their modules; "" is the module itself.
_CLASSES = {
    "SSDScoringHead": ("module_list",),  # torchvision
    "KeypointRCNNPredictor": ("kps_score_lowres",),
    "Detect": ("m", "cv2", "cv3", "cv4", "cv5", "one2one_cv2", "one2one_cv3", "one2one_cv4"),  # ultralytics, YOLOv5
    "*DepthEstimationHead": ("",),  # transformers
    "*SemanticSegmentationHead": ("",),
    "DPTAuxiliaryHead": ("",),
    "DepthProFovHead": ("",),
    "*MaskHeadSmallConv": ("output_conv",),
    "VitPose*Decoder": ("",),
    "Swin2SR*": ("final_convolution",),
    "SuperPointInterestPointDecoder": ("conv_score_b",),
}


def predicting(model: nn.Module, layers: Iterable[nn.Module], adapters: Container[nn.Module]) -> set[nn.Module]:
    """The prediction layers among `layers`. adapters: modules that are not the model's own."""
    known = set(layers)
    own = [module for module in model.modules() if module not in adapters]
    heads = [*_timm_classifiers(model), *_named(model), *_output_convolution(own)]
    return {layer for head in heads for layer in _last(head, known)}


def _last(module: nn.Module, layers: set[nn.Module]) -> list[nn.Module]:
    """The last layer of a module; for a ModuleList, whose modules predict in parallel, the last layer of each."""
    if isinstance(module, nn.ModuleList):
        return [layer for each in module for layer in _last(each, layers)]
    return [each for each in module.modules() if each in layers][-1:]


def _timm_classifiers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None)
        classifier = config.get("classifier") if isinstance(config, dict) else None
        modules = dict(module.named_modules()) if classifier else {}
        for name in [classifier] if isinstance(classifier, str) else classifier or ():
            if name in modules:
                yield modules[name]


def _named(model: nn.Module) -> Iterator[nn.Module]:
    for path, module in model.named_modules(remove_duplicate=False):
        name = path.rpartition(".")[2]
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _NAMES):
            yield module
        classes = [cls.__name__ for cls in type(module).__mro__]
        for pattern, attributes in _CLASSES.items():
            if fnmatch.filter(classes, pattern):
                parts = {"": module, **module._modules}
                yield from (part for each in attributes if (part := parts.get(each)) is not None)


def _output_convolution(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """A U-Net's output: the last module with parameters, if it is a pointwise convolution with a bias. (Not in timm's
    models: they declare their classifier, and as backbones end with any layer.)"""
    if hasattr(modules[0], "pretrained_cfg"):
        return []
    last = [module for module in modules[1:] if any(p is not None for p in module._parameters.values())][-1:]
    return [module for module in last if _is_of_pixels(module)]


def _is_of_pixels(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    return module.bias is not None and set(module.kernel_size) == {1}
