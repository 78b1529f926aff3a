"""The codes that a comparison between ranks gives, explained (FK5xx)."""

from __future__ import annotations

from freezekit.audit.explanation import FREEZE, Explanation, torch_issue, torch_page

__all__ = ["RANKS"]

_DDP = torch_page("torch.nn.parallel.DistributedDataParallel")
_GROUP = "https://docs.pytorch.org/docs/stable/distributed.html"

RANKS: dict[str, Explanation] = {
    "FK501": Explanation(
        "What is frozen has other values on some ranks than on the rest: the ranks train heads for different "
        "backbones, and the checkpoint has that of one of them.",
        "Another checkpoint, or none, was loaded on one rank; a rank resumed from an older one; statistics "
        "that move in train mode, by each rank's own data; a write on one rank alone, such as an if on the "
        "rank around too much. DistributedDataParallel sends its parameters round once, when it wraps.",
        f"Load the same checkpoint on every rank, then {FREEZE} on every rank. The finding names the ranks "
        "that are not what they froze; where each still is, those that are fewer; where that does not "
        "decide, all.",
        (_DDP, torch_issue(110363)),
    ),
    "FK502": Explanation(
        "A rank had other frozen values than another one, and has the other's now: something sent them.",
        "DistributedDataParallel with broadcast_buffers, which is the default, sends rank 0's buffers before "
        "each forward pass, the statistics of a layer in eval mode too. Or the model was wrapped, or "
        "dist.broadcast called, after the auditor was made.",
        "Load the same checkpoint on every rank before freezing. If the ranks are meant to differ: "
        "broadcast_buffers = False on the DistributedDataParallel model.",
        (_DDP, torch_issue(110363)),
    ),
    "FK503": Explanation(
        "Parameters that train have other values on some ranks: each goes its own way, and the checkpoint "
        "has that of one of them.",
        "They were unfrozen after DistributedDataParallel had wrapped the model: it looks at requires_grad "
        "once, and sends no gradients of what did not require one. Or a head was made with another seed on "
        "each rank and is not wrapped; gradients were averaged by hand, and some forgotten; a step, a "
        "learning rate or the clipping of gradients depends on the rank. Methods that average weights now "
        "and then (local SGD) differ in between: give ranks= the number of steps at which they average.",
        "Unfreeze first and wrap then, on every rank: DistributedDataParallel(ddp.module). Start from the "
        "same values.",
        (_DDP, "https://github.com/Lightning-AI/pytorch-lightning/issues/20340"),
    ),
    "FK504": Explanation(
        "The ranks have not the same model, or not the same part of it frozen, or not in the same mode.",
        "Freezing, unfreezing, model.train() or model.eval() inside an if on the rank; stages that unfreeze "
        "by the loss that each rank sees; a layer or a vocabulary whose size depends on the rank's data. "
        "Ranks of pipeline parallelism hold different layers by right: they cannot be compared.",
        "Build, freeze and switch modes in the same way on every rank; decide on what all ranks know, as the "
        "loss after an all_reduce.",
        (_DDP,),
    ),
    "FK505": Explanation(
        "The ranks have taken different numbers of optimizer steps, or one has ended its audit while others "
        "go on. Their parameters are of different moments.",
        "Data that does not divide evenly by the ranks; a step that is skipped on one rank, where its loss "
        "is NaN for example; auditors that were attached at different steps, or with different ranks=.",
        "Give each rank as many steps (drop_last=True, or DistributedSampler, which pads), and end the audit "
        "on all at once.",
        (_GROUP, torch_page("torch.distributed.algorithms.Join")),
    ),
    "FK506": Explanation(
        "A rank did not come to the comparison in time, or the connection to it broke. From then on each "
        "rank is audited alone, and nobody waits again.",
        "The rank died or hangs; it has an error of its own, the others only wait for it; it waits in "
        "another collective, because it took another branch; it has no auditor with ranks=. Or it is only "
        "slow, as while it saves a checkpoint.",
        "Look at that rank first: its own error, or its stack. Make the auditor in the same way on every "
        "rank. Raise timeout= if it was only slow.",
        (_GROUP,),
    ),
    "FK507": Explanation(
        "Another rank's own audit found something wrong which cannot be seen by comparing values, as that "
        "what the frozen part gives depends on the batch there.",
        "Modes, hooks or data that differ between ranks; or what moved there was put back by the next "
        "comparison.",
        "Read that rank's report: auditor.report() there has it with its cause.",
        (_DDP,),
    ),
}
"""What each code means at length."""
