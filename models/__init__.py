"""The article models, thin wrappers over the operators. Installed as `pykernels.models`."""

if __name__ != "pykernels.models":
    raise ImportError("import pykernels.models ('models' in the repository root would be a second copy of it)")

from .dgcnn_reader import DGCNNReader, DGCNNReaderConfig

__all__ = ["DGCNNReader", "DGCNNReaderConfig"]
