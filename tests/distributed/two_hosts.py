"""Two hosts, played by two network namespaces with names of their own and a virtual link between them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("host-a", "host-b")
_ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Job:
    """A command on one of the hosts."""

    def __init__(self, command: list[str], output: Path, environment: dict[str, str]) -> None:
        self._output = output
        with output.open("w") as stream:
            self._process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)

    @property
    def text(self) -> str:
        """What it has printed, on either stream."""
        return self._output.read_text()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Its exit code, once it has ended; an error after four minutes."""
        return self._process.wait(240)


class TwoHosts:
    """What can be done on them, and to the link between them."""

    def __init__(self, folder: Path, namespaces: tuple[str, str]) -> None:
        self._folder = folder
        self._namespaces = namespaces
        self._started = 0
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(_ADDRESSES, NAMES, strict=True))
        )

    def start(self, *argv: str) -> list[Job]:
        """`kdtune ARGV...` on each host."""
        self._started += 1
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        # `ip netns exec` gives the command mounts of its own; with a host name of its own it is a host to torchrun.
        script = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        jobs = []
        for name, namespace in zip(NAMES, self._namespaces, strict=True):
            inside = ["sh", "-c", script, name, str(self._folder / "hosts"), sys.executable, "-m", "kdtune", *argv]
            command = ["ip", "netns", "exec", namespace, "unshare", "--uts", *inside]
            jobs.append(Job(command, self._folder / f"{name}-{self._started}.txt", environment))
        return jobs

    def link(self, state: str) -> None:
        """Cuts the link ("down") or joins it again ("up")."""
        _ip("-n", self._namespaces[0], "link", "set", "link0", state)


def wait_until(condition: Callable[[], bool], jobs: list[Job]) -> None:
    """Returns when it holds; fails where a job ends before, or after four minutes."""
    give_up = time.monotonic() + 240
    while not condition():
        assert all(job.is_alive() for job in jobs) and time.monotonic() < give_up, "\n\n".join(job.text for job in jobs)
        time.sleep(0.05)


def why_not() -> str | None:
    """Why there cannot be two hosts here; None: there can."""
    missing = [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (iproute2, util-linux, hostname)"
    probe = f"kdtune-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _ip("netns", "del", probe)
    return None


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """The hosts; at the end every process on them is killed, and they are gone."""
    namespaces = (f"kdtune-{os.getpid()}-a", f"kdtune-{os.getpid()}-b")
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
        _ip(*"link add link0 netns {} type veth peer name link0 netns {}".format(*namespaces).split())
        for namespace, address in zip(namespaces, _ADDRESSES, strict=True):
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "link0")
            _ip("-n", namespace, "link", "set", "link0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
        yield TwoHosts(folder, namespaces)
    finally:
        for namespace in namespaces:
            found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
