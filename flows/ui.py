"""`python -m flows.ui [PORT]`: serve Prefect's UI with this project's runs on 127.0.0.1."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from flows import settings

HOST = "127.0.0.1"


def main(port: int) -> int:
    """Serve until interrupted; returns the exit code."""
    if running := settings.running_server():
        print(f"a server of this project already runs: {running.removesuffix('/api')}")
        return 0
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            print(f"error: port {port} is taken; choose another one: make ui PORT={port + 1}", file=sys.stderr)
            return 1
    api = f"http://{HOST}:{port}/api"
    settings.apply()
    os.environ["PREFECT_SERVER_UI_API_URL"] = api  # otherwise the browser asks port 4200, whatever --port says (3.8.8)
    os.environ["PREFECT_API_URL"] = api
    settings.HOME.mkdir(exist_ok=True)
    settings.SERVER_URL.write_text(api + "\n", encoding="utf-8")
    print(f"Prefect UI: http://{HOST}:{port}   (Ctrl-C ends it)", flush=True)
    try:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 0
    finally:
        settings.SERVER_URL.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 4200))
