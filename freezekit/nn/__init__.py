"""freezekit's own layers, under torch.nn's names."""

from freezekit.nn.affine import FrozenAffine
from freezekit.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from freezekit.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, FrozenSyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FrozenAffine",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenSyncBatchNorm",
]
