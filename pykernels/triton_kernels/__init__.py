"""The Triton kernels: a file for each operator, and what they share.

Imported when the first call needs them, not before, so that `import pykernels` works without Triton.
"""
