"""Commands of tests, forked from a process that has imported what they would spend their seconds on.

`Commands.path` is a folder of a `python`, a `colrow` and a `torchrun` that do what the real ones do, with the folder,
environment and files that they are started with; so does what they start by `sys.executable`. Where the start itself
is what a test is about, it takes the real ones.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from helpers.harness import forkserver

CLIENT = """
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(json.dumps([*sys.argv[1:3], sys.argv[3:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = answers.readline()
if not status:  # a signal has ended it
    os.kill(os.getpid(), signal.SIGKILL)
os._exit(int(status))
"""


class Commands:
    """A server that forks commands, until `stop`; `folder` is for its files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bin"
        self.path.mkdir()
        address, client = str(folder / "socket"), folder / "client.py"
        client.write_text(CLIENT.format(address=address), encoding="utf-8")
        for name in ("python", "colrow", "torchrun"):
            command = self.path / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {client} {name} {self.path} "$@"\n')
            command.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            self._server = forkserver().Process(target=_serve, args=(listener,))
            self._server.start()

    def environment(self, **more: str) -> dict[str, str]:
        """This process's, with the commands first on the path, one thread each, and no rank."""
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        paths = {"PATH": f"{self.path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
        return kept | paths | {"OMP_NUM_THREADS": "1"} | more

    def stop(self) -> None:
        self._server.kill()
        self._server.join()


def _serve(listener: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes them away
    gc.freeze()  # as in `harness`
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    """Be the process that the client asks for, and tell it the exit status."""
    _, files, *_ = socket.recv_fds(connection, 1, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    stream = connection.makefile("rw")
    name, path, args, folder, environment = json.loads(stream.readline())
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = f"{path}/python"
    tempfile.tempdir = None  # TMPDIR may have changed
    this, exit_now = os.getpid(), os._exit

    def exit_with(status: int) -> NoReturn:
        if os.getpid() == this:  # not of a process that this one has forked
            stream.write(f"{status}\n")
            stream.flush()
        exit_now(status)

    os._exit = exit_with
    status = 1
    try:
        _run(name, args)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with(client: socket.socket) -> None:
    with suppress(ConnectionResetError):  # a client that ends with unread data in its socket resets the connection
        client.recv(1)  # nothing is ever sent: the client has ended
    os.kill(os.getpid(), signal.SIGKILL)


def _run(name: str, args: list[str]) -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path[:0] = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    if name != "python":
        sys.argv = [name, *args]
        (command,) = entry_points(group="console_scripts", name=name)
        sys.exit(command.load()())
    if args[0] == "-u":
        args = args[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(args[1], "<string>", "exec"), main.__dict__)
    elif args[0] == "-m":
        sys.argv = args[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        sys.path.insert(0, str(Path(args[0]).resolve().parent))
        runpy.run_path(args[0], run_name="__main__")
