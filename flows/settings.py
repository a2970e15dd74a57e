"""Where Prefect keeps its state and which server it talks to; must be applied before Prefect is first imported.

State is in the project's own folder `.prefect`, never in the home directory; nothing is sent to any vendor.
The user's environment wins over everything here. Knows nothing of Prefect itself, so it costs nothing to import.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

HOME = Path(".prefect")
SERVER_URL = HOME / "api-url"
"""`make ui` writes the running server's API URL here, so that every flow and stage of this project finds it."""


def apply() -> None:
    """Set Prefect's, DVC's and Hugging Face's environment for this process and its children."""
    home = HOME.resolve()
    defaults = {
        "PREFECT_HOME": str(home),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "storage"),  # relative to the working folder otherwise
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # DO_NOT_TRACK alone does not stop the server's (3.8.8)
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # its browser UI asks an analytics host all the same (3.8.8)
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # 20 s is too short on a busy small machine
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if "PREFECT_API_URL" not in os.environ and (url := running_server()):
        os.environ["PREFECT_API_URL"] = url


def running_server() -> str | None:
    """The API URL of a Prefect server that is configured and answers, else None."""
    url = os.environ.get("PREFECT_API_URL")
    if not url and SERVER_URL.exists():
        url = SERVER_URL.read_text(encoding="utf-8").strip()
    if not url:
        return None
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=0.5) as answer:
            return url if answer.status == 200 else None
    except (OSError, ValueError, urllib.error.URLError):
        return None
