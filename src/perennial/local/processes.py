"""Which processes belong to a stack, and that none of them outlives it."""

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perennial.errors import Unavailable
from perennial.settings import PREFIX, Settings
from perennial.store import files

log = logging.getLogger(__name__)

PIDS = "pids.json"
STACK = "stack"
LOOPBACK = "127.0.0.1"
STOP_S = 15.0
RESTARTS = 5
RESTART_PAUSE_S = 1.0
STEADY_S = 60.0
# Below the range that the kernel hands to clients, so that none takes a port before its server.
PORTS = range(20000, 32000)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Process:
    """A process that cannot be taken for a later one with the same number."""

    pid: int
    ticks: int  # when it began, in clock ticks since the machine did

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(pid, _ticks(pid))

    @property
    def is_alive(self) -> bool:
        return self.ticks > 0 and _ticks(self.pid) == self.ticks

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to it and to all of its group; nothing happens when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive:
                os.killpg(self.pid, number)


@dataclass
class _Child:
    """A process together with how it was started."""

    command: Sequence[str]
    env: Mapping[str, str]
    popen: "subprocess.Popen[bytes]"
    process: Process
    began: float  # by the monotonic clock
    restarts: int = 0


class Claim:
    """The right to be the one stack of a state folder; held as long as this process lives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # The kernel lets go of it however the process ends, so it never outlives a stack.
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._handle)
            raise _running(folder) from exc

    def release(self) -> None:
        os.close(self._handle)


class Children:
    """The processes of one stack, each with a log of its own and written down in pids.json.

    Start them from the main thread only: they end with the thread that started them.
    """

    def __init__(self, folder: Path, logs: Path) -> None:
        self._file = folder / PIDS
        self._logs = logs
        self._children: dict[str, _Child] = {}
        logs.mkdir(parents=True, exist_ok=True)
        self._write()

    def names(self) -> tuple[str, ...]:
        return tuple(self._children)

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start a process under a name that is free."""
        assert name not in self._children, f"{name} is started twice"
        popen = self._spawn(name, command, env)
        process = Process.of(popen.pid)
        self._children[name] = _Child(command, env, popen, process, time.monotonic())
        self._write()
        log.info("started name=%s pid=%d", name, popen.pid)

    def ended(self, name: str) -> str:
        """How a process ended, with the last line of its log; empty while it runs."""
        code = self._children[name].popen.poll()
        if code is None:
            return ""
        if code < 0:
            return f"{name} ended by signal {-code}"
        said = _last_line(self.log_file(name))
        return f"{name} ended with code {code}" + (f": {said}" if said else "")

    def restart(self, name: str) -> bool:
        """Start an ended process again, a while later; False when that helped too seldom."""
        child = self._children[name]
        ran_s = time.monotonic() - child.began
        if ran_s > STEADY_S:
            child.restarts = 0
        if child.restarts >= RESTARTS or ran_s < RESTART_PAUSE_S:
            return child.restarts < RESTARTS
        child.began = time.monotonic()
        child.popen = self._spawn(name, child.command, child.env)
        child.process = Process.of(child.popen.pid)
        child.restarts += 1
        self._write()
        log.warning("started again name=%s pid=%d", name, child.popen.pid)
        return True

    def log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def stop(self, *names: str) -> None:
        """End processes together: SIGTERM, a bounded wait, SIGKILL."""
        children = [self._children.pop(name) for name in names if name in self._children]
        for child in children:
            child.process.kill(signal.SIGTERM)
        limit = time.monotonic() + STOP_S
        for child in children:
            _reap(child, limit)
        self._write()

    def stop_all(self) -> None:
        self.stop(*self.names())
        self._file.unlink(missing_ok=True)

    def _spawn(
        self, name: str, command: Sequence[str], env: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        with self.log_file(name).open("ab") as told:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                process_group=0,
                preexec_fn=end_with(os.getpid()),
            )

    def _write(self) -> None:
        table = {name: asdict(child.process) for name, child in self._children.items()}
        body = {STACK: asdict(Process.of(os.getpid())), "children": table}
        files.write_atomic(self._file, json.dumps(body, indent=1))


def stack_pid(folder: Path) -> int | None:
    """Number of the process whose stack runs in this folder, None when none does."""
    process = _read(folder).get(STACK)
    return process.pid if process and process.is_alive else None


def end_stale(folder: Path) -> list[str]:
    """End what a killed stack left behind. Raises Unavailable while that stack runs."""
    if stack_pid(folder):
        raise _running(folder)
    left = {name: p for name, p in _read(folder).items() if name != STACK and p.is_alive}
    end(list(left.values()))
    (folder / PIDS).unlink(missing_ok=True)
    return sorted(left)


def stale(folder: Path) -> list[str]:
    """Names of processes that a killed stack left behind."""
    if stack_pid(folder):
        return []
    return sorted(n for n, p in _read(folder).items() if n != STACK and p.is_alive)


def end(processes: Sequence[Process], patience_s: float = STOP_S) -> None:
    """End processes that need not be our children: SIGTERM, a bounded wait, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            process.kill(number)
        if wait_until(lambda: not any(p.is_alive for p in processes), patience_s):
            return


def wait_until(is_so: Callable[[], bool], patience_s: float, pause_s: float = 0.05) -> bool:
    """Ask again and again; says whether it came to be in time."""
    limit = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > limit:
            return False
        time.sleep(pause_s)
    return True


def signal_stack(folder: Path, patience_s: float = 2 * STOP_S) -> int | None:
    """Ask the stack of a folder to end and wait for it; gives its number, None if none ran."""
    stack = _read(folder).get(STACK)
    if stack is None or not stack.is_alive:
        return None
    os.kill(stack.pid, signal.SIGTERM)
    if not wait_until(lambda: not stack.is_alive, patience_s):
        os.kill(stack.pid, signal.SIGKILL)
        wait_until(lambda: not stack.is_alive, STOP_S)
    return stack.pid


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, all different."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in random.sample(PORTS, len(PORTS)):
            if len(found) == count:
                return found
            if is_free(port, held):
                found.append(port)
    raise Unavailable(f"no {count} free ports on {LOOPBACK} between {PORTS[0]} and {PORTS[-1]}")


def is_free(port: int, held: contextlib.ExitStack | None = None) -> bool:
    """Can a server listen there? With ``held`` the port stays taken until that is left."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.ExitStack() as mine:
        (held or mine).callback(server.close)
        try:
            server.bind((LOOPBACK, port))
            server.listen(1)
        except OSError:
            return False
    return True


def edge_port(wanted: int) -> int:
    """The port for clients; 0 means any. Raises Unavailable when somebody listens there."""
    if wanted and not is_free(wanted):
        raise Unavailable(
            f"port {wanted} of {LOOPBACK} is in use; end its owner, or set PERENNIAL_EDGE_PORT to"
            " another port (0 means any free one)"
        )
    return wanted or free_ports(1)[0]


def surroundings(settings: Settings) -> dict[str, str]:
    """Variables by which a child reads the same settings as we have."""
    given = settings.model_copy(update={"home": settings.home.resolve()})
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in given if value is not None}


def _running(folder: Path) -> Unavailable:
    pid = stack_pid(folder)
    return Unavailable(
        f"a stack is already running for {folder.parent.name}"
        f" ({f'pid {pid}' if pid else 'it just starts'}); end it by 'perennial down'"
    )


def _read(folder: Path) -> dict[str, Process]:
    try:
        raw: dict[str, Any] = json.loads((folder / PIDS).read_text())
        return {name: Process(**at) for name, at in {**raw["children"], STACK: raw[STACK]}.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as exc:
        log.warning("unreadable %s: %s", folder / PIDS, exc)
        return {}


def _ticks(pid: int) -> int:
    """Start of a process; 0 when there is none or it is dead and only not yet buried."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else int(rest[18])


def end_with(parent: int) -> Callable[[], None]:
    """What a child does before its program begins: ask the kernel to end it with its parent."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _reap(child: _Child, limit: float) -> None:
    if child.popen.returncode is not None:
        return
    if not wait_until(lambda: not child.process.is_alive, limit - time.monotonic()):
        log.warning("killed pid=%d: it did not end by itself", child.popen.pid)
    # Not buried yet, so the number is still its own; this also ends what is left of its group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.popen.pid, signal.SIGKILL)
    child.popen.wait()


def _last_line(path: Path) -> str:
    lines = list(_tail(path))
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")[:300]


def _tail(path: Path, size: int = 4096) -> Iterator[str]:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - size, 0))
        yield from (line.strip() for line in file.read().decode(errors="replace").splitlines())
