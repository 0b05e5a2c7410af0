"""Save, resume, read and convert checkpoints."""

import os

# Every process that reads checkpoints unpickles only tensors and plain values. In PyTorch this
# variable overrides the argument of the caller, and DeepSpeed asks to unpickle everything.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
