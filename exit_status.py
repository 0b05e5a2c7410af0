"""Name the exit statuses of every command."""

FINISHED = 0
FAILED = 1  # an error of the machine, or one that nobody expected
BAD_INPUT = 2  # starting again does not help; argparse's own status
HUNG = 70  # also a run that diverged; EX_SOFTWARE in sysexits.h
PREEMPTED = 75  # start it again and it resumes; EX_TEMPFAIL in sysexits.h
INTERRUPTED = 130  # by a second Ctrl-C, as shells report it: 128 + SIGINT
