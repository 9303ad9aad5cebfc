"""The article models, thin wrappers over the operators. Installed as `pykernels.models`."""

if __name__ != "pykernels.models":
    raise ImportError("import pykernels.models ('models' in the repository root would be a second copy of it)")

from .dgcnn_extractor import DGCNNExtractor, DGCNNExtractorConfig
from .dgcnn_reader import DGCNNReader, DGCNNReaderConfig
from .dgcnn_reader_2018 import DGCNNReader2018, DGCNNReader2018Config
from .gaussian_mixture import GaussianMixture
from .generative import GenerativeConfig, generative_model, load_generative, save_generative
from .variational import AAE, ALI, GAN, VAE

__all__ = [
    "AAE",
    "ALI",
    "DGCNNExtractor",
    "DGCNNExtractorConfig",
    "DGCNNReader",
    "DGCNNReader2018",
    "DGCNNReader2018Config",
    "DGCNNReaderConfig",
    "GAN",
    "GaussianMixture",
    "GenerativeConfig",
    "VAE",
    "generative_model",
    "load_generative",
    "save_generative",
]
