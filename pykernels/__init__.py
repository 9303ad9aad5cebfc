"""Fused kernels with gradients for light NLP models in PyTorch.

Operators are functions of tensors, each with an nn.Module of the same name in capitals whose state dict is that of the
PyTorch layer it replaces. `python -m pykernels.env` tells what this installation can do on this machine.
"""

from ._backend import set_backend
from .attention_pool import AttentionPool, attention_pool
from .child_tuning import ChildTuningAdamW, ChildTuningSGD
from .dora_linear import dora_linear
from .fisher_masks import fisher_masks
from .fuse import fuse, register_fusion, unfuse
from .gated_conv import GatedConv1d, gated_conv1d
from .gated_conv_step import gated_conv1d_step
from .lora import LoRALinear
from .lora_files import load_lora, save_lora
from .lora_linear import lora_linear, lora_linear_multi
from .lora_linear_stacked import lora_linear_stacked
from .lora_model import apply_lora, lora_disabled, lora_layers, merge_lora, unload_lora, unmerge_lora
from .loraplus import loraplus_param_groups

__version__ = "0.1.0"
__all__ = [
    "AttentionPool",
    "ChildTuningAdamW",
    "ChildTuningSGD",
    "GatedConv1d",
    "LoRALinear",
    "apply_lora",
    "attention_pool",
    "dora_linear",
    "fisher_masks",
    "fuse",
    "gated_conv1d",
    "gated_conv1d_step",
    "load_lora",
    "lora_disabled",
    "lora_layers",
    "lora_linear",
    "lora_linear_multi",
    "lora_linear_stacked",
    "loraplus_param_groups",
    "merge_lora",
    "register_fusion",
    "save_lora",
    "set_backend",
    "unfuse",
    "unload_lora",
    "unmerge_lora",
]
