"""Trace chosen steps with torch.profiler, for TensorBoard's plugin or https://ui.perfetto.dev."""

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, tensorboard_trace_handler

from training.config import TrainConfig, profiled_steps


def profile_steps(config: TrainConfig, first_step: int, rank: int) -> profile:
    """Return a profiler that traces the steps of --profile; its `step` is called after each step.

    The file is `profile/rankN.<time>.pt.trace.json.gz` in the run folder; the phases of a step
    (data, forward, backward, reduce, optimizer, log) bear their names.

    Args:
        config: The run.
        first_step: The first that this process does: later than 0 in a resumed run.
        rank: This process.
    """
    first, end = profiled_steps(config)

    def action(n_steps: int) -> ProfilerAction:
        step = first_step + n_steps
        if not first <= step < end:
            return ProfilerAction.NONE
        return ProfilerAction.RECORD_AND_SAVE if step == end - 1 else ProfilerAction.RECORD

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(ProfilerActivity.CUDA)
    folder = str(config.run_dir / "profile")
    return profile(
        activities=activities,
        schedule=action,
        on_trace_ready=tensorboard_trace_handler(folder, f"rank{rank}", use_gzip=True),
        record_shapes=True,
    )
