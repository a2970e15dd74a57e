"""The one exception for what a user can cause: it is printed as a sentence, without a traceback."""


class InputError(ValueError):
    """A parameter, file or model the pipeline can't work with.

    The message names the value, what was expected, and the way out.
    """
