"""train.py with one more preset, `sample`: its vocabulary is small, and so are its checkpoints."""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from model import GPTConfig
from model.presets import PRESETS, Preset
from train import main
from training.ranks import leave

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=32, vocab_size=250)
PRESET = Preset(
    SHAPE, 256, 1e-2, max_tokens=2048, decay_tokens=2048, warmup_tokens=512, hellaswag_every=0
)

if __name__ == "__main__":
    PRESETS["sample"] = PRESET
    leave(main(sys.argv[1:]))
