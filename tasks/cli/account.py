"""What libraries ask of the user's account, told where the machine has none: a container's number without a name.

DVC, Prefect, torch and Hugging Face look for a home folder and a name when they are imported, and fail with a traceback
where neither the environment nor the table of users has them.
"""

from __future__ import annotations

import getpass
import os

HOME = "/"
"""What Docker gives such a user."""


def complete() -> None:
    """Set HOME and USER for this process and its children where they can't be found out."""
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = HOME
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
