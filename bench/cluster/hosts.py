"""Make machines of this one: network namespaces, each with its own sshd, host name and address.

This needs root, iproute2, openssh-server and pdsh (`make debian`). The machines share the disk, as
they would a network file system, and reach each other only through a switch, itself a namespace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from bench.processes import environment_without_ranks, wait_until

SSH_PORT = 2222
# What ranks need on such a machine: its network, a core each, no GPU.
VARIABLES = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("ip", "unshare", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh")


def missing() -> str:
    """Return why there can be no machines here, or ""."""
    lacking = [name for name in NEEDED if not shutil.which(name)]
    if lacking:
        return f"lacks {', '.join(lacking)}: make debian"
    probe = f"nanoprobe{os.getpid()}"
    command = ["ip", "netns", "add", probe]
    made = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


class Hosts(contextlib.ExitStack):
    """Machines node-1, node-2, … at 10.77.0.1, 10.77.0.2, …; a context that takes them down.

    Args:
        folder: For keys, settings and logs.
        n: Machines.
    """

    def __init__(self, folder: Path, n: int) -> None:
        super().__init__()
        self.folder = folder
        self.names = [f"node-{i + 1}" for i in range(n)]
        self.prefix = f"nano{os.getpid()}"
        self.variables = dict(VARIABLES)
        self.home = folder / "home"
        self.home.mkdir()

    def __enter__(self) -> Hosts:
        super().__enter__()
        with contextlib.ExitStack() as undo:
            undo.push(self)
            self._write_settings()
            self._namespace("switch")
            self._in("switch", "ip", "link", "add", "bridge", "type", "bridge")
            self._in("switch", "ip", "link", "set", "bridge", "up")
            for i, name in enumerate(self.names):
                self._connect(i, name)
            for name in self.names:
                self._start_sshd(name)
            undo.pop_all()
        return self

    def cut(self, name: str) -> None:
        """Take down the link between a machine and all others."""
        self._in("switch", "ip", "link", "set", name, "down")

    def popen(self, name: str, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a machine, in the repository; what it prints goes into a file."""
        environment = environment_without_ranks() | self.variables | {"HOME": str(self.home)}
        # Our ssh comes first, then this Python and its `deepspeed`.
        environment["PATH"] = f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        with log.open("ab") as file:
            return subprocess.Popen(
                self._on(name, command), cwd=ROOT, stdout=file, stderr=file, env=environment
            )

    def serve(self, name: str, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command that ends with the machine."""
        daemon = self.popen(name, command, log)
        self.callback(daemon.wait)
        self.callback(daemon.kill)
        return daemon

    def pids(self, name: str) -> set[int]:
        """Return the processes of a machine."""
        return _pids_in(f"{self.prefix}-{name}")

    def _on(self, name: str, command: list[str]) -> list[str]:
        script = f'hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        inside = ["unshare", "--mount", "--uts", "sh", "-c", script, "sh", *command]
        return ["ip", "netns", "exec", f"{self.prefix}-{name}", *inside]

    def _in(self, name: str, *command: str) -> None:
        whole = ["ip", "netns", "exec", f"{self.prefix}-{name}", *command]
        subprocess.run(whole, check=True, capture_output=True)

    def _namespace(self, name: str) -> None:
        whole = f"{self.prefix}-{name}"
        subprocess.run(["ip", "netns", "add", whole], check=True)
        self.callback(subprocess.run, ["ip", "netns", "del", whole], check=False)
        self.callback(_end_all_in, whole)  # a launcher waits for ever for a machine that is cut off

    def _connect(self, i: int, name: str) -> None:
        self._namespace(name)
        switch = f"{self.prefix}-switch"
        self._in(name, "ip", "link", "set", "lo", "up")
        self._in(name, "ip", "link", "add", "eth0", "type", "veth", "peer", name, "netns", switch)
        self._in(name, "ip", "address", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
        self._in(name, "ip", "link", "set", "eth0", "up")
        self._in("switch", "ip", "link", "set", name, "master", "bridge", "up")

    def _write_settings(self) -> None:
        folder = self.folder
        for key in ("user", "machine"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(command, check=True)
        lines = [f"10.77.0.{i + 1} {name}" for i, name in enumerate(self.names)]
        text = "\n".join(["127.0.0.1 localhost", *lines, ""])
        (folder / "hosts").write_text(text, encoding="utf-8")
        (folder / "sshd_config").write_text(
            f"Port {SSH_PORT}\nHostKey {folder}/machine\nAuthorizedKeysFile {folder}/user.pub\n"
            "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nMaxStartups 100\n",
            encoding="utf-8",
        )
        (folder / "ssh_config").write_text(
            f"Host *\n  Port {SSH_PORT}\n  IdentityFile {folder}/user\n  LogLevel ERROR\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n",
            encoding="utf-8",
        )
        ssh = folder / "ssh"
        script = f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n'
        ssh.write_text(script, encoding="utf-8")
        ssh.chmod(0o755)

    def _start_sshd(self, name: str) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        log = self.folder / f"sshd_{name}.log"
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config")]
        daemon = self.serve(name, command, log)

        def listens() -> bool:
            return "Server listening" in log.read_text(encoding="utf-8")

        wait_until(lambda: listens() or daemon.poll() is not None, timeout_s=10)
        if not listens():
            raise RuntimeError(f"sshd of {name}: {log.read_text(encoding='utf-8')}")


def _pids_in(namespace: str) -> set[int]:
    command = ["ip", "netns", "pids", namespace]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    return set(map(int, done.stdout.split()))


def _end_all_in(namespace: str) -> None:
    for pid in _pids_in(namespace):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
