"""The shape of one GPT (Radford et al. 2019; Brown et al. 2020, Table 2.1)."""

from dataclasses import dataclass

VOCAB_ALIGNMENT = 128  # rows of wte: whole tiles of every matrix unit
CHUNK_LOGITS = 2**25  # logits that the loss holds at a time on a CPU: 64 MiB in bf16


@dataclass(frozen=True)
class MemoryUse:
    """What a training pass keeps in a GPU's memory: more memory, more speed.

    Attributes:
        keeps_gelu: Whether the GELU's output is kept for the backward pass, or computed again.
        chunk_rows: Rows of logits that the loss holds at a time: whole tiles of the matrix units.
            With more of them the head's gradient is summed less often. 16,384 rows of GPT-2's
            vocabulary are 1.6 GB in bf16.
    """

    keeps_gelu: bool
    chunk_rows: int


# The fastest first: a run takes the first that fits.
MEMORY_USES = (
    MemoryUse(keeps_gelu=True, chunk_rows=16_384),
    MemoryUse(keeps_gelu=False, chunk_rows=16_384),
    MemoryUse(keeps_gelu=False, chunk_rows=8192),
    MemoryUse(keeps_gelu=False, chunk_rows=4096),
)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT: everything that a weight's size depends on, and dropout.

    `gelu` is PyTorch's name: GPT-2's own approximation "tanh", or "none", the exact one that
    nanoGPT trains with.

    Raises:
        ValueError: A size is not positive, the heads do not divide the width, dropout is outside
            [0, 1), or no such GELU.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0
    gelu: str = "tanh"

    def __post_init__(self) -> None:
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        sizes = {name: getattr(self, name) for name in names}
        wrong = [name for name, size in sizes.items() if type(size) is not int or size < 1]
        if wrong:
            what = "must be a whole number of at least 1"
            raise ValueError(f"{wrong[0]} = {sizes[wrong[0]]!r}: {what}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: must be in [0, 1)")
        if self.gelu not in ("tanh", "none"):
            raise ValueError(f"gelu = {self.gelu}: must be tanh or none")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of `wte`: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT

    def n_params(self) -> int:
        """Count the parameters at `vocab_size`, tied head counted once, padding not at all."""
        d = self.n_embd
        block = 12 * d * d + 13 * d  # qkv 3d²+3d, proj d²+d, MLP 8d²+5d, two LayerNorms 4d
        return (self.vocab_size + self.block_size) * d + self.n_layer * block + 2 * d

    def flops_per_token(self, seq_len: int) -> int:
        """Count training FLOPs per token, forward and backward: 6N + 12·L·d·T (PaLM, App. B)."""
        return 6 * self.n_params() + 12 * self.n_layer * self.n_embd * seq_len


def chunk_rows(n_rows: int, vocab_size: int, on_gpu: bool, gpu_rows: int) -> int:
    """Return how many of `n_rows` rows of logits the loss holds at a time."""
    if on_gpu:
        return min(n_rows, gpu_rows)
    n_chunks = -(-n_rows * vocab_size // CHUNK_LOGITS)
    return -(-n_rows // n_chunks)
