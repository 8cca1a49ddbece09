"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a flag, a checkpoint.

    Its message is one clear line with the values. The command line prints it without a
    traceback and exits with code 2; in Python it is an ordinary ValueError.
    """
