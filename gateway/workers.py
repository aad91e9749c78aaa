"""Worker processes that share one listening socket, and the supervisor that keeps them alive."""

import errno
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from rollout.errors import ConfigError

if TYPE_CHECKING:
    from rollout.settings import Settings

# How soon a worker that died is started again, and how many that live no longer than that end all.
_RESTART_SECONDS: Final = 1.0
_SHORT_LIVES: Final = 5
_COLLECT_AFTER: Final = (20_000, 20, 20)


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket. Raises ConfigError with what to do where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(backlog)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use: stop what listens there (see `ss -ltnp`), or "
                "choose another with `port` under [gateway] or --port",
                param="gateway.port",
            ) from exc
        raise ConfigError(
            f"cannot listen on {host} port {port}: {exc.strerror}; set `host` and `port` under "
            "[gateway]",
            param="gateway.host",
        ) from exc
    sock.setblocking(False)
    return sock


def serve(settings: "Settings", read: "Callable[[], Settings]", sock: socket.socket) -> int:
    """Serve in this process until a signal ends it; the exit status.

    `read` gives the configuration as it is after a SIGHUP.
    """
    # Imported here, because prometheus_client looks for its directory when it is imported.
    from gateway.app import Gateway
    from gateway.server import server_for

    gateway = Gateway(settings)
    server = server_for(gateway, gateway.own, read)
    # What was made until now stays for good, and requests leave hardly any cycles behind: the
    # collector may look for them seldom. It took 7 % of the time.
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
    server.run(sockets=[sock])
    return 0 if server.started else 1


def supervise(
    count: int, metrics_dir: Path, work: Callable[[], int], reread: Callable[[], None]
) -> int:
    """Keep `count` processes doing `work`, until a signal ends them; the exit status.

    After a SIGHUP `reread` is called, for those that are started later.
    """
    shutil.rmtree(metrics_dir, ignore_errors=True)
    metrics_dir.mkdir(parents=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics_dir)
    try:
        return _Supervisor(count, work, reread).run()
    finally:
        shutil.rmtree(metrics_dir, ignore_errors=True)


class _Supervisor:
    """Waits for signals in one place, so that none can come in between."""

    def __init__(self, count: int, work: Callable[[], int], reread: Callable[[], None]) -> None:
        self._count = count
        self._work = work
        self._reread = reread
        self._workers: dict[int, ForkProcess] = {}
        self._short_lives = 0
        self._stopping = False

    def run(self) -> int:
        watched = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        for _ in range(self._count):
            self._start()
        while self._workers:
            found = signal.sigtimedwait(watched, _RESTART_SECONDS)
            if found is None:
                self._short_lives = 0
                self._refill()
            elif found.si_signo == signal.SIGCHLD:
                self._reap()
            elif found.si_signo == signal.SIGHUP:
                self._reread()
                for pid in self._workers:
                    os.kill(pid, signal.SIGHUP)
            else:
                self._stop(found.si_signo)
            if self._short_lives > _SHORT_LIVES * self._count:
                sys.stderr.write("gateway: its workers keep dying; see the messages above\n")
                self._stop(signal.SIGTERM)
        return 0 if self._stopping and self._short_lives <= _SHORT_LIVES * self._count else 1

    def _start(self) -> None:
        worker = multiprocessing.get_context("fork").Process(target=_worker, args=(self._work,))
        worker.start()
        self._workers[cast(int, worker.pid)] = worker

    def _reap(self) -> None:
        for pid, worker in list(self._workers.items()):
            if worker.exitcode is None:
                continue
            del self._workers[pid]
            worker.close()
            self._forget_metrics(pid)
            if not self._stopping:
                self._short_lives += 1
                sys.stderr.write(f"gateway: worker {pid} died; another is started\n")
        if not self._workers and not self._stopping:
            self._refill()

    def _refill(self) -> None:
        while not self._stopping and len(self._workers) < self._count:
            self._start()

    def _stop(self, signum: int) -> None:
        """Ask the workers to drain; a second Ctrl-C is passed on and ends them at once."""
        again, self._stopping = self._stopping, True
        for pid in self._workers:
            if not again or signum == signal.SIGINT:
                os.kill(pid, signum if again else signal.SIGTERM)

    def _forget_metrics(self, pid: int) -> None:
        """Gauges of the dead must not be shown; what they counted stays."""
        from prometheus_client import multiprocess

        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _worker(work: Callable[[], int]) -> None:
    # SIGHUP stays blocked until the server can take it; before that it would end the process.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    sys.exit(work())
