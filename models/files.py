"""How models and examples write files: whole or not at all."""

from pykernels._files import save_tensors, write_atomically

__all__ = ["save_tensors", "write_atomically"]
