"""`edgepress ui [PORT]`: serve Prefect's UI with this project's runs on 127.0.0.1, until Ctrl-C or SIGTERM.

While it runs, the project's flows and stages register with it: they find its URL in settings.SERVER_URL.
"""

from __future__ import annotations

import argparse
import signal
import socket
import threading

from flows.server import settings
from flows.server.temporary import HOST, mend_database, serve
from tasks.algorithms.errors import InputError
from tasks.runtime import files


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("port", nargs="?", type=int, default=4200, help="0 takes any free one (default: 4200)")


def main(given: argparse.Namespace) -> None:
    """Serve until interrupted.

    Raises:
        InputError: the port can't be had.
    """
    settings.apply()
    if running := settings.running_server():
        print(f"a Prefect server for this project already runs: {running.removesuffix('/api')}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else uvicorn ends the process before the clean-up
    try:
        with socket.create_server((HOST, given.port)) as listener:
            print("starting the Prefect server ...", flush=True)
            mend_database()
            serve(listener, started=_announce)
    except KeyboardInterrupt:
        print("stopped")
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or "it must be 0 to 65535"
        raise InputError(f"cannot serve on port {given.port}: {why}; another one: edgepress ui 4300") from error
    finally:
        settings.SERVER_URL.unlink(missing_ok=True)


def _announce(url: str) -> None:
    settings.HOME.mkdir(exist_ok=True)
    files.write_text(settings.SERVER_URL, f"{url}/api\n")
    threading.Thread(target=_watch, daemon=True).start()  # this thread is the one that answers
    print(f"Prefect UI: {url}   (Ctrl-C ends it)", flush=True)


def _watch() -> None:
    from prefect.client.orchestration import get_client  # here: Prefect reads the environment when it is imported

    from flows.server import heartbeats

    with get_client(sync_client=True) as client:
        heartbeats.watch(client)
