"""The one class of errors that are not bugs."""

TRACEBACK_VARIABLE = "SKYLADDER_TRACEBACK"  # set: errors that have a message keep their traceback
STOPPED = 130  # exit code of a command that Ctrl-C has ended, as the shell gives


class UsageError(ValueError):
    """What was asked for cannot be done, and whoever started the run can change that.

    A flag, a variable, an input or a checkpoint does not fit; the message says what was given, what
    is needed and what to do, so nobody needs a traceback. Every rank comes to the same conclusion
    before training. All other errors, a plain ``ValueError`` among them, are faults of the
    program: they keep their traceback.
    """
