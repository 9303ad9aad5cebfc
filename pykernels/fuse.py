"""fuse: our operators inside of models of other packages, undone by unfuse; register_fusion adds classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from . import fused_glu, fused_pooling, fused_wavenet
from ._fusion import Forward, Fusion, differs, fused_class
from .lora import check_layer

# The ends of full names, so that no package is imported and copies of a module are served too: all that is found by
# name is compared with its own forward.
_KNOWN: dict[str, Fusion] = {
    "transformers.models.vits.modeling_vits.VitsWaveNet": fused_wavenet.VITS,
    "modules.WN": fused_wavenet.WN,
    "gluonts.torch.model.wavenet.module.CausalDilatedResidualLayer": fused_wavenet.GLUONTS,
    "layers.residual_block.WaveNetResidualBlock": fused_wavenet.PARALLEL_WAVEGAN,
    "diffwave.model.ResidualBlock": fused_wavenet.DIFFWAVE,
    "backbones.wavenet.ResidualBlock": fused_wavenet.DIFFSINGER,
    "fairseq.models.fconv.FConvEncoder": fused_glu.FAIRSEQ_ENCODER,
    "fairseq.models.fconv.FConvDecoder": fused_glu.FAIRSEQ_DECODER,
    "modules.seq2seq_encoders.gated_cnn_encoder.ResidualBlock": fused_glu.ALLENNLP,
    "torchmil.nn.attention.attention_pool.AttentionPool": fused_pooling.TORCHMIL,
}
_SERVED = (
    "PEFT's LoRA layers of linear layers, VitsWaveNet of transformers, WN of VITS, CausalDilatedResidualLayer of "
    "GluonTS, WaveNetResidualBlock of Parallel WaveGAN, ResidualBlock of DiffWave and DiffSinger, FConvEncoder and "
    "FConvDecoder of fairseq, ResidualBlock of AllenNLP's gated CNN, AttentionPool of torchmil, or a class of "
    "register_fusion's"
)
_registered: dict[type, Fusion] = {}


def fuse(model: nn.Module) -> nn.Module:
    """Gives layers of other packages our forward, in place. Returns the model; `unfuse` undoes it.

    Parameters, their names, state dicts, saving and loading stay the model's own, and so do outputs and gradients but
    for rounding. What our operators do not serve at the time of a call (hooks on the layers inside, mixed dtypes,
    torch.vmap) runs in the layer's own forward. Fusing twice is fusing once. Exported models hold PyTorch's own
    operators. Of these classes, and not of their subclasses:

    * PEFT's LoRA layers of nn.Linear and Conv1D. Adapters are switched, added, merged, disabled and saved by PEFT as
      before. A layer with one active adapter, LoRA or DoRA, is computed by `lora_linear` or `dora_linear`, a batch with
      an adapter for each row (adapter_names) by `lora_linear_multi`; several active adapters, merged, disabled, a mixed
      batch under dropout and PEFT's cache of DoRA's norms run in PEFT's own forward. Which elements dropout drops is
      `lora_linear`'s, also governed by torch.manual_seed. LoRA of embeddings, of convolutions and of quantized layers,
      and modules_to_save, are left as they are.
    * The gated convolutions of VITS (transformers' VitsWaveNet, and WN in a module named `modules`), GluonTS
      (CausalDilatedResidualLayer), Parallel WaveGAN (WaveNetResidualBlock), DiffWave and DiffSinger (ResidualBlock), by
      `gated_conv1d`. Weight norm may be there in either of PyTorch's forms, or be removed later. Dropout drops the same
      elements. But for VITS', results are views of [B, L, C].
    * The gated linear units of fairseq's FConvEncoder and FConvDecoder (0.10 and later) and of AllenNLP's
      GatedCnnEncoder (ResidualBlock), by `gated_conv1d`; weight norm and dropout as above. With an
      incremental_state the decoder runs in its own forward. A compiled or exported encoder returns its padding mask
      also where there is no padding, for which eager ones return None.
    * torchmil's AttentionPool, by `attention_pool`. A bag without instances gives zeros, where torchmil gives NaN.
    * Classes given to `register_fusion`.

    But for PEFT's, each layer's own forward is compared with ours on a small input without random draws, so that a
    class of the same name that computes something else is noticed (not for parameters on the meta device).

    Raises, before anything is changed, TypeError for what is no module; ValueError, with the layer's name, where a
    layer has what is never served (for PEFT variants of LoRA but DoRA, and lora_bias; other activations, strides or
    padding; hooks or another forward inside), was given another forward (as accelerate's dispatch does) or itself to
    fully_shard (fuse first; a block around it may have been), or where there is no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    _refuse_sharded(model, lambda cls: "_fused_from" in vars(cls) or _kind(cls) is not None)
    changes: list[tuple[nn.Module, type]] = []
    for name, layer in model.named_modules():
        cls = type(layer)
        known = _kind(vars(cls).get("_fused_from", cls))
        if known is not None:
            name = name or "model"
            if "forward" in vars(layer):
                raise ValueError(f"{name}: expected the forward of {cls.__name__}, got one that was put in its place")
            changes.append((layer, known(name, layer)))
    if not changes:
        raise ValueError(f"model: expected a model with {_SERVED}, got one without")
    for layer, cls in changes:
        layer.__class__ = cls
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Their own forward again, for all layers that `fuse` has changed; there may be none.

    ValueError with the name where such a layer was itself given to fully_shard.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    _refuse_sharded(model, lambda cls: "_fused_from" in vars(cls))
    for layer in model.modules():
        if (cls := vars(type(layer)).get("_fused_from")) is not None:
            layer.__class__ = cls
    return model


def register_fusion(cls: type[nn.Module], forward: Forward, *, check: Callable[[Any], str] | None = None) -> None:
    """Makes `fuse` serve a class of your own; given again, the last one counts for layers that are fused from then on.

        def forward(layer, own, x):  # own: the layer's own forward, for what ours does not serve
            if x.dim() != 3:
                return own(x)
            return gated_conv1d(x, layer.conv.weight, layer.conv.bias)

        register_fusion(Block, forward)

    Args:
        cls: a subclass of nn.Module; its own subclasses are not served by it.
        forward: called as forward(layer, own, *args, **kwargs) instead of cls.forward. A function of a module, where
            fused models are to be pickled. That it computes the same is not checked.
        check: called as check(layer) by `fuse`, which is refused where it returns what the layer has that cannot be
            served; "" serves.

    TypeError for other arguments.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or "_fused_from" in vars(cls):
        raise TypeError(f"cls: expected a subclass of nn.Module that is not fused, got {cls!r}")
    for name, given in (("forward", forward), ("check", check)):
        if not callable(given) and not (name == "check" and given is None):
            raise TypeError(f"{name}: expected a function, got {type(given).__name__}")
    _registered[cls] = Fusion(forward, check)


# --- classes that are served ---


def _kind(cls: type) -> Callable[[str, Any], type] | None:
    """A function that checks a layer of that class and returns its fused class; None for classes that are left."""
    fusion = _registered.get(cls)
    if fusion is None:
        if (peft := sys.modules.get("peft.tuners.lora.layer")) is not None and cls is peft.Linear:
            return _peft
        if not cls.__module__.startswith("torch."):
            name = f".{cls.__module__}.{cls.__qualname__}"
            fusion = next((known for end, known in _KNOWN.items() if name.endswith(f".{end}")), None)
    return None if fusion is None else lambda name, layer: _checked(name, layer, fusion)


def _checked(name: str, layer: nn.Module, fusion: Fusion) -> type:
    cls = type(layer)
    if "_fused_from" in vars(cls):
        return cls
    try:
        what = fusion.check(layer) if fusion.check is not None else ""
    except AttributeError as error:
        what = f"another class of this name: {error}"
    if what or (what := differs(layer, fusion)):
        raise ValueError(f"{name}: expected a {cls.__name__} that can be fused, got {what}")
    return fused_class(cls, fusion.forward)


def _peft(name: str, layer: Any) -> type:
    from .peft_linear import FusedLinear, unserved

    for adapter in layer.lora_A:
        if what := unserved(layer, adapter):
            raise ValueError(f"{name}: expected LoRA or DoRA, got {what} in the adapter {adapter!r}")
    check_layer(f"{name}.base_layer", layer.base_layer)
    return FusedLinear


def _refuse_sharded(model: nn.Module, served: Callable[[type], bool]) -> None:
    """fully_shard changes the class of a module too, to one that it makes."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, layer in model.named_modules() if fsdp is not None else ():
        if isinstance(layer, fsdp.FSDPModule) and any(map(served, type(layer).__mro__[1:])):
            raise ValueError(f"{name}: expected a layer before fully_shard, got {type(layer).__name__}")
