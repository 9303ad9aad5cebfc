"""The article models, thin wrappers over the operators. Installed as `pykernels.models`.

The language models (GPT2ML, NezhaDialog, CDialGPT) are models of transformers, which is imported when one of them is
asked for.
"""

if __name__ != "pykernels.models":
    raise ImportError("import pykernels.models ('models' in the repository root would be a second copy of it)")

from typing import TYPE_CHECKING, Any

from .dgcnn_extractor import DGCNNExtractor, DGCNNExtractorConfig
from .dgcnn_reader import DGCNNReader, DGCNNReaderConfig
from .dgcnn_reader_2018 import DGCNNReader2018, DGCNNReader2018Config
from .gaussian_mixture import GaussianMixture
from .generative import GenerativeConfig, generative_model, load_generative, save_generative
from .variational import AAE, ALI, GAN, VAE

if TYPE_CHECKING:
    from .cdial_gpt import CDialGPT, CDialGPTConfig
    from .gpt2_ml import GPT2ML, GPT2MLConfig
    from .nezha import NezhaConfig, NezhaDialog

__all__ = [
    "AAE",
    "ALI",
    "CDialGPT",
    "CDialGPTConfig",
    "DGCNNExtractor",
    "DGCNNExtractorConfig",
    "DGCNNReader",
    "DGCNNReader2018",
    "DGCNNReader2018Config",
    "DGCNNReaderConfig",
    "GAN",
    "GPT2ML",
    "GPT2MLConfig",
    "GaussianMixture",
    "GenerativeConfig",
    "NezhaConfig",
    "NezhaDialog",
    "VAE",
    "generative_model",
    "load_generative",
    "save_generative",
]

_LAZY = {"CDialGPT": "cdial_gpt", "GPT2ML": "gpt2_ml", "Nezha": "nezha"}


def __getattr__(name: str) -> Any:
    module = next((module for prefix, module in _LAZY.items() if name.startswith(prefix)), None)
    if module is None or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        message = f"{name} needs transformers (pip install 'transformers>=5.24'): {error}"
        raise ModuleNotFoundError(message, name=error.name) from None
