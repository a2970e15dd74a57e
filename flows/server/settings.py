"""Where Prefect keeps its state and which server it talks to; must be applied before Prefect is first imported.

State is in the project's own folder `.prefect`, never in the home directory; nothing is sent to any vendor.
The user's environment wins over everything here. Knows nothing of Prefect itself, so it costs nothing to import.
"""

from __future__ import annotations

import base64
import http
import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

HOME = Path(".prefect")
SERVER_URL = HOME / "api-url"
"""`make ui` writes the running server's API URL here, so that every flow and stage of this project finds it."""
NO_PROXY = ("no_proxy", "NO_PROXY")
OWN = ("127.0.0.1", "localhost")
"""Where this project's server is."""
PATIENCE = 2.0
"""Seconds to wait for a server's answer: one that is busy is not gone. No server at all is known at once."""


def apply() -> None:
    """Set Prefect's, DVC's and Hugging Face's environment for this process and its children."""
    home = HOME.resolve()
    defaults = {
        "PREFECT_HOME": str(home),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "storage"),  # relative to the working folder otherwise
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # DO_NOT_TRACK alone does not stop the server's (3.8.8)
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # its browser UI asks an analytics host all the same (3.8.8)
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; a dead flow is one that misses three
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    _past_proxies()
    if "PREFECT_API_URL" not in os.environ and (password := os.environ.get("PREFECT_SERVER_API_AUTH_STRING")):
        os.environ.setdefault("PREFECT_API_AUTH_STRING", password)  # the server that it protects is this project's own
    if "PREFECT_API_URL" not in os.environ and (url := running_server()):
        os.environ["PREFECT_API_URL"] = url


def _past_proxies() -> None:
    """Where a proxy is set, leave this machine's own servers out: urllib, httpx and websockets would ask it for them.

    Python prefers the name in small letters, other programs the other one: both get what either says.
    """
    if not urllib.request.getproxies_environment():
        return
    said = ",".join(os.environ.get(name, "") for name in NO_PROXY)
    names = [name for name in map(str.strip, said.split(",")) if name]
    if "*" not in names:
        os.environ.update(dict.fromkeys(NO_PROXY, ",".join(dict.fromkeys([*names, *OWN]))))


def running_server() -> str | None:
    """The API URL of a Prefect server that is configured and answers, else None.

    Configured is what the environment names, or what `make ui` left in SERVER_URL. That file can be stale, and its port
    in use by another project's server: this project's is the one that keeps its state here.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        return url if _get(f"{url}/health") is not None and not _wants_password(url) else None
    try:
        url = SERVER_URL.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    found = _get(f"{url}/admin/settings")
    home = os.environ.get("PREFECT_HOME", str(HOME.resolve()))
    return url if isinstance(found, dict) and found.get("home") == home else None


def _wants_password(url: str) -> bool:
    """Whether a server that says it is well refuses everything else."""
    if "PREFECT_API_KEY" in os.environ:  # Prefect Cloud's
        return False
    try:
        with urllib.request.urlopen(_request(f"{url}/admin/version"), timeout=PATIENCE):
            return False
    except urllib.error.HTTPError as error:
        return error.code == http.HTTPStatus.UNAUTHORIZED
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _request(url: str) -> urllib.request.Request:
    request = urllib.request.Request(url)
    if name_and_password := os.environ.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", f"Basic {base64.b64encode(name_and_password.encode()).decode()}")
    return request


def _get(url: str) -> object | None:
    """The JSON that a GET of the URL answers; None where there is no such answer."""
    try:
        with urllib.request.urlopen(_request(url), timeout=PATIENCE) as answer:
            return json.load(answer)
    except (OSError, ValueError, http.client.HTTPException):
        return None
