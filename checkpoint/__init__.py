"""What survives a run."""

import os

# Wherever checkpoints are touched, nothing is unpickled but tensors and plain values: PyTorch puts
# this above what a caller asks for, and DeepSpeed asks for anything.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
