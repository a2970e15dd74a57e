"""A process that has the heavy libraries in memory, and forks a child for each stage: it pays no import.

`edgepress run` starts it with the first stage that has to run (`Server`) and names its socket to the stages, whose
`python -m flows.stage NAME` then is a thin client (`run`): it hands over its arguments, folder, environment and
streams, passes signals on, and ends as the child ends. If one of the two dies, the other one does. Only third-party
libraries are imported before the fork, so a copy of the project runs its own code.

A client that differs from the server in what a process can't change afterwards runs its stage itself, as without one.

Run as a file, with the socket's path: as a module it would import this project.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import io
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

SOCKET = "EDGEPRESS_WARM"
"""Environment variable with the path of a server's socket."""
CLIENT = "EDGEPRESS_CLIENT"
"""Set in a child: the process that asked for it, which stands for the stage wherever a process is named."""
THREADS = "OMP_NUM_THREADS"
"""Of torch and of every BLAS."""
FREE = ("CUDA_", "DVC_", "EDGEPRESS_", "GIT_", "PREFECT_", "PYTEST_", "PYTORCH_", "TORCHINDUCTOR_")
FREE_NAMES = (THREADS, "PATH", "PWD", "OLDPWD", "SHLVL", "_", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY")
"""Variables that nothing reads before a stage begins; in all others client and server must agree."""
LIBRARIES = (
    "dvc.repo",
    "pandas",
    "peft",
    "pydantic",
    "safetensors.torch",
    "tokenizers",
    "torch",
    "torch._dynamo.eval_frame",  # gptqmodel imports both, 2.3 s of the 2.9 that it takes; itself it starts threads
    "torch._inductor.compile_fx",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
ACCEPTED = b"+"


class Server:
    """The flow's end of it: starts the process when it is first asked for, and ends it. Takes calls of any thread.

    Attributes:
        path: the socket's; empty before it was asked for.
    """

    path = ""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory | None = None
        self._process: subprocess.Popen | None = None

    def environment(self) -> dict[str, str]:
        """What a stage's environment needs; nothing where the own one names a server already."""
        if SOCKET in os.environ or sys.platform != "linux":
            return {}
        with self._lock:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="edgepress-")
                self.path = f"{self._folder.name}/socket"
                self._process = subprocess.Popen(
                    [sys.executable, __file__, self.path],
                    stdin=subprocess.PIPE,  # closed with this process, however that ends
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=dict(os.environ),  # without what a library has set behind Python's back (readline)
                    start_new_session=True,  # Ctrl-C reaches the clients, which pass it on
                )
                self._process.stdout.readline()  # it listens
            return {SOCKET: self.path}

    def close(self) -> None:
        """End the process, and with it all its children."""
        with self._lock:
            if self._folder and self._process:
                self._process.kill()
                self._process.communicate()
                self._folder.cleanup()
                self._folder = self._process = None


def stage_process() -> int:
    """The id of the process that stands for this stage: this one, or the client that had it forked."""
    return int(os.environ.get(CLIENT, os.getpid()))


def run(module: str) -> int | None:
    """Run `python -m module` with this process's arguments in the server's child; returns the exit code.

    Returns None where no server takes it. Does not return if the child was ended by a signal: so is this process then.
    """
    if not (path := os.environ.get(SOCKET)):
        return None
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(path)
            _ask(server, module)
            passed = {number: signal.signal(number, lambda got, _: server.send(bytes([got]))) for number in PASSED}
            accepted = server.recv(1) == ACCEPTED
            if not accepted:
                for number, handler in passed.items():
                    signal.signal(number, handler)
                return None
        except OSError:
            return None
        answer = _read(server, 4)
    status = struct.unpack("i", answer)[0] if answer else -signal.SIGKILL  # the server's death is the child's
    if status < 0:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


PASSED = (signal.SIGTERM, signal.SIGINT)


def _ask(server: socket.socket, module: str) -> None:
    _die_with_parent()
    asked = {
        "module": module,
        "arguments": sys.argv[1:],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "client": os.getpid(),
        "process": _process(os.environ),
    }
    text = json.dumps(asked).encode()
    socket.send_fds(server, [struct.pack("Q", len(text))], [0, 1, 2])
    server.sendall(text)


def _process(environment: Any) -> list[Any]:
    """What a process has from its start on, and a forked one from the server's."""
    kept = {key: value for key, value in environment.items() if key not in FREE_NAMES and not key.startswith(FREE)}
    limits = [
        resource.getrlimit(getattr(resource, name)) for name in sorted(dir(resource)) if name.startswith("RLIMIT")
    ]
    mask = os.umask(0o77)
    os.umask(mask)
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid", "user")]
    cores = sorted(os.sched_getaffinity(0))
    ids = [os.getuid(), os.getgid(), os.nice(0), os.readlink("/proc/self/root")]
    return json.loads(json.dumps([sys.executable, sys.prefix, kept, limits, mask, spaces, cores, ids]))


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGKILL)


def _read(connection: socket.socket, size: int) -> bytes:
    """So many bytes; fewer, none of them, where the other side ended."""
    found = b""
    while len(found) < size:
        if not (more := connection.recv(size - len(found))):
            return b""
        found += more
    return found


class _Request(NamedTuple):
    asked: dict[str, Any]
    streams: list[int]


class _Serving:
    """The server's loop: connections, children, and the end of the process that started it."""

    def __init__(self, path: str) -> None:
        self.process = _process(os.environ)
        self.threads = os.environ.get(THREADS)
        self.ready: bool | None = None
        self.children: dict[socket.socket, tuple[int, int]] = {}  # pid, and a descriptor that is readable at its end
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self._connected)
        self.selector.register(0, selectors.EVENT_READ, sys.exit)
        print("listening", flush=True)

    def loop(self) -> _Request:
        """Serve; returns in each child, with what it has to do."""
        while True:
            for key, _ in self.selector.select():
                if key.fd not in self.selector.get_map():
                    continue
                if isinstance(request := key.data(), _Request):
                    return request

    def _connected(self) -> _Request | None:
        connection, _ = self.listener.accept()
        connection.settimeout(60)
        try:
            header, streams, _, _ = socket.recv_fds(connection, 8, 3)
            asked = json.loads(_read(connection, struct.unpack("Q", header)[0]))
            fits = asked["process"] == self.process and (asked["environment"].get(THREADS) or self.threads is None)
            if len(streams) == 3 and fits and self._load():
                connection.sendall(ACCEPTED)
                return self._fork(connection, _Request(asked, streams))
        except (OSError, ValueError, struct.error):  # the client is gone
            streams = []
        for descriptor in streams:
            os.close(descriptor)
        connection.close()
        return None

    def _load(self) -> bool:
        """Import the libraries, once; whether a fork is safe: no thread has started."""
        if self.ready is None:
            _load()
            self.ready = threading.active_count() == 1
        return self.ready

    def _fork(self, connection: socket.socket, request: _Request) -> _Request | None:
        if not (pid := os.fork()):
            _die_with_parent()
            self.selector.close()
            self.listener.close()
            for other, (_, descriptor) in self.children.items():
                other.close()
                os.close(descriptor)
            connection.close()
            return request
        for descriptor in request.streams:
            os.close(descriptor)
        descriptor = os.pidfd_open(pid)
        self.children[connection] = pid, descriptor
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._told(connection))
        self.selector.register(descriptor, selectors.EVENT_READ, lambda: self._ended(connection))
        return None

    def _told(self, connection: socket.socket) -> None:
        """Signals of a client go to its child; its end is its child's."""
        pid, _ = self.children[connection]
        try:
            numbers = connection.recv(64)
        except OSError:
            numbers = b""
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)
        if not numbers:
            self.selector.unregister(connection)

    def _ended(self, connection: socket.socket) -> None:
        pid, descriptor = self.children.pop(connection)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(struct.pack("i", status))
        for closed in (connection, descriptor):
            with contextlib.suppress(KeyError):
                self.selector.unregister(closed)
        connection.close()
        os.close(descriptor)


def _load() -> None:
    """Import the libraries as a stage does; what this project adds to that is forgotten again."""
    import gc

    sys.path.insert(0, str(Path(__file__).parents[2]))
    importlib.import_module("tasks.cli.quiet").apply(bars=True)
    importlib.import_module("tasks.runtime.lean").apply()
    del sys.path[0]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tasks", "flows")]:
        del sys.modules[name]
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # as `flows.server.settings` has it
    # torch (2.13) asks for a GPU while it is imported; the driver would answer this process, and then no child of it
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child's collections leave these pages shared


def _become(asked: dict[str, Any], streams: list[int], threads: str | None) -> None:
    """Make this child the process that the client would have been."""
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.environ.pop(SOCKET)
    os.environ[CLIENT] = str(asked["client"])
    for place, descriptor in enumerate(streams):
        os.dup2(descriptor, place)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  as long as the process
    sys.stdout, sys.stderr = _stream(1, os.isatty(1), "strict"), _stream(2, True, "backslashreplace")
    sys.path.insert(0, asked["folder"])
    sys.argv[1:] = asked["arguments"]
    importlib.invalidate_caches()
    wanted = os.environ.get(THREADS)
    if wanted != threads:
        import threadpoolctl
        import torch

        torch.set_num_threads(int(wanted))
        threadpoolctl.threadpool_limits(int(wanted))


def _run(module: str) -> None:
    """Run `python -m module` in this child; then, as children of `multiprocessing` do, end without taking apart what
    the server has imported: that would copy its memory, which this child shares, and take 0.4 CPU seconds.
    """
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        threading._shutdown()
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # nobody reads it: Python's own end says so
            raise end from None
        ctypes.CDLL(None).fflush(None)
        os._exit(end.code)


def _stream(descriptor: int, lines: bool, errors: str) -> io.TextIOWrapper:
    """As Python makes it when it starts."""
    at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
    file = open(descriptor, "wb", 0 if at_once else -1, closefd=False)  # noqa: SIM115  as long as the process
    return io.TextIOWrapper(file, errors=errors, line_buffering=lines, write_through=at_once)


if __name__ == "__main__":
    del sys.path[0]  # this room: its modules are no top-level ones
    serving = _Serving(sys.argv[1])
    request = serving.loop()
    _become(*request, serving.threads)
    _run(request.asked["module"])
