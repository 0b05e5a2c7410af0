"""A torch.profiler trace of chosen steps, for TensorBoard's plugin and https://ui.perfetto.dev."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler


class Trace:
    """Traces the steps `first` to `end` - 1 of this rank into one file of `folder`.

    The file is `rankN.<time>.pt.trace.json.gz`; the phases of a step (data, forward, backward,
    reduce, optimizer, log) bear their names.
    """

    def __init__(self, first: int, end: int, folder: Path, rank: int) -> None:
        self.first, self.end, self.running = first, end, False
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(ProfilerActivity.CUDA)
        written = tensorboard_trace_handler(str(folder), f"rank{rank}", use_gzip=True)
        self.profile = profile(activities=activities, record_shapes=True, on_trace_ready=written)

    def before(self, step: int) -> None:
        """Start at the first step, or at a later one where the run was resumed."""
        if self.first <= step < self.end and not self.running:
            self.profile.start()
            self.running = True

    def after(self, step: int) -> None:
        """Write the file after the last one."""
        if self.running and step + 1 == self.end:
            self.profile.stop()
            self.running = False
