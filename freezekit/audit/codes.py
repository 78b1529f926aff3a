"""What each code means at length: how people get there, what to do, and where it is written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from freezekit.audit.codes_files import FILES
from freezekit.audit.codes_ranks import RANKS
from freezekit.audit.explanation import FREEZE, Explanation, torch_issue, torch_page, torch_source
from freezekit.audit.findings import CODES
from freezekit.errors import FreezekitError

__all__ = ["EXPLANATIONS", "known_codes"]


def known_codes(given: Iterable[str]) -> list[str]:
    """Return codes as they are written here, in the order given.

    Args:
        given: codes, in capitals or not.

    Raises:
        FreezekitError: there is no such code; the error gives the closest.

    >>> known_codes(["fk301"])
    ['FK301']
    """
    found = []
    for code in given:
        name = code.strip().upper()
        if name not in CODES:
            close = sorted(difflib.get_close_matches(name, CODES, n=len(CODES), cutoff=0.6))
            close.sort(key=lambda known: sum(map(str.__ne__, known, name)))  # a digit in its place counts
            remedy = (
                f"did you mean {' or '.join(close[:2])}?" if close else "freezekit explain lists them all"
            )
            raise FreezekitError("no such code", where="CODE", got=repr(code)[:40], remedy=remedy)
        found.append(name)
    return found


_BATCH_NORM = torch_page("torch.nn.BatchNorm2d")
_BATCH_NORM_CODE = torch_source("nn/modules/batchnorm.py")
_ZERO_GRAD = torch_page("torch.optim.Optimizer.zero_grad")

EXPLANATIONS: dict[str, Explanation] = {
    "FK101": Explanation(
        "The running mean or variance of a frozen norm layer is not what it was. In eval mode the layer "
        "normalises by these, so all that follows sees other features, though no weight has changed.",
        "requires_grad=False stops gradients. Running statistics have none: each forward pass in train mode "
        "moves them, under torch.no_grad() too. Every training loop calls model.train(). With activation "
        "checkpointing they move twice a step.",
        f"{FREEZE} keeps the layer in eval mode whatever model.train() does. Statistics that have moved "
        "already come back only from the checkpoint that training started from.",
        (
            torch_issue(86590),
            "https://github.com/kdexd/virtex/issues/16",
            "https://github.com/huggingface/peft/issues/1732",
            torch_issue(96136),
        ),
    ),
    "FK102": Explanation(
        "num_batches_tracked of a frozen layer has moved, the mean and the variance have not. The output is "
        "the same, but the layer is in train mode, or something counts for it.",
        "A layer with momentum=0.0 in train mode: the statistics stay, the counter goes on.",
        f"{FREEZE}: a layer in eval mode does not count.",
        (_BATCH_NORM_CODE,),
    ),
    "FK103": Explanation(
        "A parameter that is meant to be frozen has other values.",
        "It still required a gradient; it had a gradient from before it was frozen; an optimizer moved it by "
        "weight decay or momentum, which torch's do on a gradient of zero though not on none; an optimizer "
        "of another make decays what has no gradient; or code wrote to it, a weight average or a second "
        "load_state_dict for example.",
        "freezekit.freeze_backbone(model, optimizer=optimizer) before training: what is frozen leaves the "
        "optimizer. The auditor names the cause where it can be told.",
        (_ZERO_GRAD, torch_issue(150610), "https://github.com/KellerJordan/Muon/issues/54"),
    ),
    "FK104": Explanation(
        "A buffer of the frozen part, other than running statistics, has other values.",
        "Layers that learn without gradients: codebooks of vector quantisation, the vectors of spectral "
        "norm, the ranges of quantisation observers, counters of one's own. Most move in train mode, some "
        "in eval mode as well.",
        f"{FREEZE} keeps the layer in eval mode, and observers from observing. A layer that writes in eval "
        "mode by its own forward has to be changed, or left out of what is frozen.",
        ("https://github.com/lucidrains/vector-quantize-pytorch/issues/167", torch_issue(8208)),
    ),
    "FK105": Explanation(
        "The frozen part has not the tensors it had: one is gone or new, or has another shape or dtype.",
        "A layer was replaced after freezing, and the new one trains; a vocabulary was resized, which makes "
        "a new embedding that requires a gradient; the model was cast with .half() after the comparison was "
        "set up; the two checkpoints are of different models.",
        "Change, cast and load the model first, then freeze it and make the auditor. For files, compare "
        "checkpoints of one model in one dtype.",
        ("https://github.com/kohjingyu/fromage/issues/18",),
    ),
    "FK106": Explanation(
        "A frozen tensor is on another device than when it was first seen. Its values are the same.",
        "model.to(device) after the auditor was made.",
        "Move the model, then make the auditor and the optimizer.",
        (torch_page("torch.nn.Module"),),
    ),
    "FK201": Explanation(
        "What the frozen part gives for an example depends on the other examples in the batch. Nothing need "
        "have moved, and yet it is not the function it was.",
        "A BN layer that normalises by the batch: in train mode, or without running statistics, or with "
        "track_running_stats set to False to freeze it.",
        f"{FREEZE}. A layer that has no running statistics cannot be frozen: make it with "
        "track_running_stats=True and calibrate it first.",
        (_BATCH_NORM, "https://github.com/pytorch/pytorch/pull/38084"),
    ),
    "FK202": Explanation(
        "The frozen part gives another output each time, for the same input: it drops something at random.",
        "requires_grad=False leaves dropout and stochastic depth on, as long as the model is in train mode. "
        "Some want this, as augmentation of the features: hence a warning.",
        f"{FREEZE} switches it off; hold='norm' leaves it on, on purpose.",
        (
            "https://github.com/nickgkan/butd_detr/issues/8",
            "https://github.com/OpenGVLab/InternVL/issues/544",
        ),
    ),
    "FK203": Explanation(
        "For the same input the frozen part gives another output than when it was frozen.",
        "A tensor has moved (see the FK1xx findings); or something has that is no tensor: a mode, a hook, a "
        "number on the Python side, a layer's function. Another kernel, dtype or device also gives "
        "other last bits.",
        "Mend the FK1xx findings first. If there is none, look for what the forward reads besides tensors.",
        ("https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html",),
    ),
    "FK301": Explanation(
        "A frozen layer with running statistics is in train mode. Its next forward pass moves them, and "
        "normalises by the batch instead.",
        "Freezing by requires_grad=False alone, or model.train() after the layers were put into eval mode.",
        f"{FREEZE}, or freezekit.freeze(model, NAMES) for single parts.",
        (torch_issue(86590), "https://github.com/kdexd/virtex/issues/16"),
    ),
    "FK302": Explanation(
        "A frozen parameter is in an optimizer that will move it though its gradient is zero or missing.",
        "torch's optimizers skip a parameter whose .grad is None. If it is a tensor of zeros, weight "
        "decay and momentum still apply; zero_grad(set_to_none=False) after unfreezing and freezing again "
        "leaves such. LBFGS takes a missing gradient for zero and goes on in the directions it remembers.",
        "optimizer.zero_grad(set_to_none=True) once after freezing, or freeze with optimizer=optimizer: what "
        "is frozen leaves the optimizer, and its momentum is kept for later.",
        (_ZERO_GRAD, torch_source("optim/lbfgs.py")),
    ),
    "FK303": Explanation(
        "A frozen parameter has a gradient from before it was frozen, and is in an optimizer. The next step "
        "applies it, if nothing clears it first.",
        "Training, then requires_grad=False without clearing: an optimizer looks at .grad, and not at "
        "requires_grad.",
        "optimizer.zero_grad(set_to_none=True) once after freezing. Freezing with freezekit clears it.",
        (_ZERO_GRAD,),
    ),
    "FK304": Explanation(
        "A frozen layer normalises by the batch: what it gives for an example depends on the others, and its "
        "statistics, if it has any, are not used.",
        "Made with track_running_stats=False, where eval mode has nothing else to go by; or the attribute "
        "was set to False to freeze the layer, which keeps the statistics still and leaves train mode "
        "normalising by the batch.",
        "Set track_running_stats back to True and freeze. A layer made without statistics has to be made "
        "with them, and calibrated (freezekit.update_bn), before it can be frozen.",
        (
            _BATCH_NORM,
            torch_issue(37823),
            "https://github.com/Lightning-AI/pytorch-lightning/pull/15063",
        ),
    ),
    "FK305": Explanation(
        "A frozen layer is in eval mode, as it should be, but by nothing more than its flag. The next "
        "model.train() sets it back, and then the layer moves.",
        "model.backbone.eval() once before a loop that calls model.train() in each epoch, as trainers do. "
        "A train() method that puts the layer back into eval mode is a remedy and is recognised: it is "
        "tried on a copy without values. Where it was not called yet, calling it is the fix.",
        f"{FREEZE}: its class says that it is in eval mode, so that no assignment reaches it.",
        (torch_issue(66073), "https://github.com/pgniewko/gt-pyg/issues/112"),
    ),
    "FK306": Explanation(
        "Dropout, stochastic depth or the dropout of attention is on in the frozen part, or will be after "
        "model.train(). The head is trained on features that it will not see afterwards.",
        "requires_grad=False does not switch it off. Some want it on, as augmentation: hence a warning.",
        f"{FREEZE}, without hold='norm'.",
        (
            "https://github.com/nickgkan/butd_detr/issues/8",
            "https://github.com/OpenGVLab/InternVL/issues/544",
        ),
    ),
    "FK307": Explanation(
        "A frozen embedding has max_norm, and rows longer than that. Looking one up shortens it in place, in "
        "eval mode and under torch.no_grad() as well.",
        "Pretrained vectors loaded into nn.Embedding(..., max_norm=1.0) and frozen.",
        "Shorten all rows once with weight.data.renorm_, or leave them as they are; then set max_norm to "
        "None.",
        (torch_page("torch.nn.Embedding"),),
    ),
    "FK308": Explanation(
        "A frozen layer writes to its own buffers when it is used.",
        "spectral_norm improves its vectors u and v in each forward pass in train mode. Observers and fake "
        "quantisation record ranges in eval mode too, until they are switched off. InstanceNorm whose "
        "track_running_stats was set to False afterwards moves its statistics in eval mode.",
        f"{FREEZE} holds these layers; disable_observer() switches off a fake quantiser alone.",
        (
            torch_issue(8208),
            torch_source("ao/quantization/fake_quantize.py"),
            torch_source("nn/modules/instancenorm.py"),
        ),
    ),
    "FK309": Explanation(
        "A frozen layer has buffers with the names that codebooks use for their moving averages: in train "
        "mode such a codebook follows its inputs, without any gradient. Or it is an InstanceNorm with "
        "running statistics, under a torch that writes them back in eval mode, off by rounding.",
        "requires_grad=False on a model with vector quantisation. The names are all there is to go by, so "
        "this may be wrong. InstanceNorm is tried on a copy: torch 2.6 does it, whenever the batch is no "
        "power of two.",
        f"{FREEZE} keeps a codebook in eval mode. For InstanceNorm a newer torch, or a layer of "
        "freezekit.nn in its place.",
        (
            "https://github.com/lucidrains/vector-quantize-pytorch/issues/167",
            "https://github.com/lucidrains/vector-quantize-pytorch/issues/42",
        ),
    ),
    "FK310": Explanation(
        "A frozen tensor lies in the same memory as a parameter that trains. A step on one changes both.",
        "nn.Parameter(other.weight.data) or a view, to start a new layer from an old one. Weights that "
        "are tied, as a language model's head and its embedding are, can only be frozen together.",
        "Copy it with .clone(), or freeze both names.",
        ("https://github.com/huggingface/transformers/issues/11903",),
    ),
    "FK311": Explanation(
        "frozen= names tensors that require a gradient, and so an optimizer that has them moves them.",
        "The patterns say what is meant to be frozen, but nothing froze it; or something made it trainable "
        "again, as resizing a vocabulary does.",
        "freezekit.freeze(model, NAMES, optimizer=optimizer), with the same names.",
        ("https://github.com/kohjingyu/fromage/issues/18",),
    ),
    "FK312": Explanation(
        "Of a norm layer's weight and bias one is frozen and one trains. Its running statistics then "
        "count as trained, and move.",
        "Patterns that end in .weight, or training biases alone.",
        "Freeze the layer by its name; or freezekit.freeze_backbone(model, bn='freeze_stats'), where weight "
        "and bias train and the statistics stay.",
        (torch_issue(86590),),
    ),
    "FK313": Explanation(
        "A parameter requires a gradient, but none of the optimizers given has it: it keeps the values it "
        "was made with.",
        "The optimizer was made before the new head, or from the parameters that required a gradient then.",
        "optimizer.add_param_group(...), or make the optimizer last, from "
        "freezekit.trainable_parameters(model). Give all the optimizers as a list if there are several.",
        (torch_page("torch.optim.Optimizer.add_param_group"),),
    ),
    "FK314": Explanation(
        "No parameter of the model or of its optimizers requires a gradient. backward() will fail, or "
        "nothing will be learnt.",
        "The head was frozen with the rest.",
        "freezekit.unfreeze(model, NAMES), or requires_grad_(True) on what is to train.",
        (torch_page("torch.nn.Module"),),
    ),
    "FK315": Explanation(
        "A frozen parameter has a gradient from before it was frozen. Nothing given here applies it, but "
        "another optimizer would, and clip_grad_norm_ counts it.",
        "Training, then requires_grad=False without clearing the gradients.",
        "model.zero_grad(set_to_none=True) once after freezing.",
        (_ZERO_GRAD, torch_source("nn/utils/clip_grad.py")),
    ),
    "FK316": Explanation(
        "A frozen parameter is in an optimizer that is not one of torch's. Whether it leaves alone what has "
        "no gradient cannot be told from outside, and some do not.",
        "Lookahead pulls every parameter towards its slow weights; schedule-free optimizers move what they "
        "have stepped when they are set to train or eval; some decay all of their parameters.",
        "freezekit.freeze(model, NAMES, optimizer=optimizer), or make it from "
        "freezekit.trainable_parameters(model).",
        ("https://github.com/KellerJordan/Muon/issues/54",),
    ),
    "FK317": Explanation(
        "DistributedDataParallel sends rank 0's buffers to the other ranks before each forward pass, the "
        "frozen ones too. Where a rank has other values, they are overwritten.",
        "The default. Harmless while all ranks have the same, which freezekit.DriftAuditor(..., ranks=10) "
        "tells; not after loading on one rank alone.",
        "model.broadcast_buffers = False on the DistributedDataParallel model, if no other layer needs it, "
        "or the same checkpoint on every rank.",
        (torch_page("torch.nn.parallel.DistributedDataParallel"), torch_issue(110363)),
    ),
    "FK318": Explanation(
        "A frozen tensor has no values: its layer is lazy, or it is on the meta device. It will be filled "
        "later, and what it is filled with is not what was frozen.",
        "Freezing before the first batch, or before the checkpoint is loaded.",
        "Run a batch or load the checkpoint first, then freeze.",
        (torch_page("torch.nn.modules.lazy.LazyModuleMixin"), torch_page("torch.nn.Module")),
    ),
    **FILES,
    **RANKS,
}
