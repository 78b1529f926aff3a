"""The codes that a file's statistics get, explained (FK4xx)."""

from __future__ import annotations

from freezekit.audit.explanation import Explanation, torch_issue, torch_page, torch_source

__all__ = ["FILES"]

_BATCH_NORM = torch_page("torch.nn.BatchNorm2d")
_BATCH_NORM_CODE = torch_source("nn/modules/batchnorm.py")

FILES: dict[str, Explanation] = {
    "FK401": Explanation(
        "A running mean or variance holds NaN or infinity: in eval mode the layer gives NaN for all inputs.",
        "One batch that overflowed, in mixed precision for example: the gradient scaler skips the step, but "
        "the forward pass has updated the statistics already. Or a batch of one value.",
        "Take the statistics from the base checkpoint, or calibrate them anew on clean data.",
        (torch_issue(88474), "https://github.com/facebookresearch/SparseConvNet/issues/190"),
    ),
    "FK402": Explanation(
        "A running variance or a count of batches is below zero, which no data gives. Where a variance is "
        "below -eps the output is NaN.",
        "A checkpoint converted from another framework, with eps taken off or tensors in another order.",
        "Convert it again, or take the statistics from a checkpoint that is right.",
        (
            "https://github.com/shicai/MobileNet-Caffe/issues/87",
            "https://github.com/marvis/pytorch-caffe-darknet-convert/issues/48",
        ),
    ),
    "FK403": Explanation(
        "A layer's running statistics are those it was made with: mean 0, variance 1. Its weight and bias "
        "are as well, or it has counted batches, which would have moved them.",
        "A layer added or replaced after training, or weights that did not reach it, as load_state_dict with "
        "strict=False allows.",
        "Load what this file was meant to hold, or calibrate the layer: freezekit.update_bn(loader, model).",
        (
            "https://github.com/cleinc/bts/issues/90",
            "https://github.com/deezer/spleeter/issues/151",
            _BATCH_NORM_CODE,
        ),
    ),
    "FK404": Explanation(
        "The parts of the model have seen different numbers of batches.",
        "Part of the model was frozen, and rightly so: then this is what one expects. A layer that is called "
        "several times a step counts each. Otherwise the file was put together from two models, or "
        "load_state_dict with strict=False did not reach a part.",
        "Nothing, if part of it was frozen. If not, find out where its parts come from.",
        (_BATCH_NORM_CODE,),
    ),
    "FK405": Explanation(
        "Some channels were constant in training: their variance is next to nothing, though the filter "
        "before is not. In eval mode they are divided by sqrt(eps), so that an input that is new in them, "
        "however small, comes out large.",
        "A ReLU before that is dead, images with an empty channel, features that are always 0 in the data. "
        "Many published files have channels without variance because weight decay drove the filter to 0: "
        "nothing can come out there, and these are not told of.",
        "Nothing, while the inputs are as in training. Otherwise set the weight of these channels to 0, "
        "which keeps what they give constant, or train on data where they vary.",
        ("https://github.com/BVLC/caffe/issues/3963", torch_issue(5410), _BATCH_NORM),
    ),
    "FK406": Explanation(
        "Statistics that cannot be computed well with: inputs that overflow float16 (above 65504), a channel "
        "whose standard deviation is more than 1,000 times the median of its layer, or a mean more than "
        "1,000 standard deviations from 0, of which float16 keeps no digit and bfloat16 neither.",
        "A batch or a step that diverged: the loss recovers, the running variance keeps it for long. A layer "
        "over raw inputs, such as years or prices, has such statistics by right: hence a warning.",
        "Go back to a checkpoint before it, or calibrate: freezekit.update_bn(loader, model). Scale raw "
        "inputs before they reach the layer.",
        (
            "https://github.com/tensorflow/tensorflow/issues/44371",
            "https://github.com/apple/coreai-torch/pull/54",
            torch_issue(115500),
        ),
    ),
    "FK407": Explanation(
        "A layer has counted fewer batches than the optimizer in the file took steps on its weight and on "
        "the weights before it. In train mode each step is at least one batch. So its statistics were reset "
        "or calibrated, or the layer was in eval mode, and training may have gone on past them.",
        "Calibrating (update_bn) in the middle of a run and training on in eval mode; model.eval() for a "
        "validation without model.train() after it; averaged weights whose statistics nobody computed. "
        "Calibrating last, as stochastic weight averaging does, gives the same numbers and is right: hence a "
        "warning.",
        "Nothing, if it was calibrated last. Otherwise freezekit.update_bn(loader, model) after training.",
        (
            "https://github.com/Lightning-AI/pytorch-lightning/issues/14866",
            "https://github.com/mosaicml/composer/issues/624",
            "https://github.com/HuiZeng/Grid-Anchor-based-Image-Cropping-Pytorch/issues/2",
        ),
    ),
    "FK408": Explanation(
        "A layer still has the statistics of the base, bit for bit, while the weights before it were "
        "trained. In eval mode it normalises by what these no longer give.",
        "The layer was in eval mode while the rest trained. Detection models do so on purpose (norm_eval, "
        "FrozenBatchNorm2d): the network has learnt with these constants, and all is well. By mistake it is "
        "model.eval() for a validation without model.train() after it.",
        "Nothing, if it was meant; naming the layer with --frozen says so. Otherwise train it in train mode, "
        "or calibrate: freezekit.update_bn(loader, model).",
        (
            "https://github.com/open-mmlab/mmdetection/issues/346",
            "https://github.com/HuiZeng/Grid-Anchor-based-Image-Cropping-Pytorch/issues/2",
        ),
    ),
    "FK409": Explanation(
        "Running statistics of mean 0 and variance 1, as a layer is made with, where there may be a reason "
        "for it: its weight and bias were trained but nothing was counted, or only some channels have them.",
        "Weights from Caffe or Detectron have the statistics folded into weight and bias. Some models train "
        "with the layer in eval mode from the start. By mistake the statistics were not saved, as when only "
        "parameters are; or a layer was widened, and the new channels are untrained.",
        "Nothing, if it was trained so. Otherwise load the statistics, or calibrate the layer: "
        "freezekit.update_bn(loader, model).",
        (
            "https://github.com/open-mmlab/mmdetection/issues/1217",
            "https://github.com/princeton-vl/RAFT-Stereo/issues/58",
            "https://github.com/torch/nn/issues/1165",
        ),
    ),
}
