import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from launch.hostfile import listed_hosts, read_hostfile


def write(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hosts_and_slots_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\nnode-2.cluster slots=8\n\n  10.0.0.1\tslots=4 \n")
    assert read_hostfile(path) == {"node-2.cluster": 8, "10.0.0.1": 4}


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_bytes(b"\xef\xbb\xbfnode-1 slots=8\n")
    assert read_hostfile(path) == {"node-1": 8}
    assert listed_hosts(path) == ["node-1", "slots=8"]


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("w slots=2 # eight", "w"),
        ("w slots=2#eight", "w"),
        ("alice@w slots=2", "alice@w"),
        ("svc-ml.x@10.0.0.7 slots=2", "svc-ml.x@10.0.0.7"),
        ("gpu_node_1 slots=2", "gpu_node_1"),
        ("GPU-1.Example.COM slots=2", "GPU-1.Example.COM"),
        ("w slots=2 max_slots=4", "w"),
        ("w max-slots=4 slots=2", "w"),
        ("w\tslots = 2", "w"),
        ("w slots=2 \r", "w"),
        ("localhost slots=2", "localhost"),
    ],
)
def test_lines_of_other_programs_and_systems_are_taken(
    tmp_path: Path, line: str, host: str
) -> None:
    path = tmp_path / "hostfile"
    path.write_bytes(f"# ours\r\n\r\n{line}\r\nlast slots=1".encode())
    assert read_hostfile(path) == {host: 2, "last": 1}


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=touch${IFS}x slots=1",
        "w;id slots=2",
        "w$(id) slots=2",
        "w`id` slots=2",
        "w slots=0",
        "w",
        "w slots=2 slots=4",
        "w slots=2 cores=4",
        "alice@bob@w slots=2",
        "@w slots=2",
        "bob@first slots=2",
        "FIRST slots=2",
        "w. slots=2",
        "http://w slots=2",
        "DOMAIN\\\\alice@w slots=2",
        "../w slots=2",
        "w- slots=1",
        "a" * 300 + " slots=1",
        "w\x00 slots=1",
        "first slots=2",
    ],
)
def test_what_is_no_host_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, f"first slots=1\n{line}\n")
    with pytest.raises(ValueError, match=f"{path}:2: .* Fix: "):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("::1 slots=8", "is an IPv6 address, "),
        ("fe80::1%eth0 slots=8", "is an IPv6 address, "),
        ("alice@[2001:db8::1] slots=8", "is an IPv6 address, "),
        ("[::1]:22 slots=8", "is an IPv6 address, "),
        ("w:22 slots=8", "a port is given as --ssh_port"),
        ("w:8", "slots as slots=8"),
        ("node[01-04] slots=8", "has '[' in its name"),
        ("w,x slots=8", "has ',' in its name"),
        ("w$(id) slots=8", "has '$' in its name"),
        ("w`id` slots=8", "has '`' in its name"),
        ("w;id slots=8", "has ';' in its name"),
        ("knoten-ä slots=8", "has 'ä' in its name"),
        ("w", "slots=1 to slots=99999"),
        ("w slots=0", "slots=1 to slots=99999"),
        ("a" + " " * 2**18 + "x", "slots=1 to slots=99999"),
    ],
)
def test_a_line_is_refused_by_what_is_wrong_with_it(tmp_path: Path, line: str, what: str) -> None:
    with pytest.raises(ValueError, match=r":2: .* Fix: give a line like node-2 slots=8") as refused:
        read_hostfile(write(tmp_path, f"first slots=1\n{line}\n"))
    assert what in str(refused.value)


def test_a_folder_and_a_file_in_utf_16_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("w slots=1\n", encoding="utf-16")
    for no_text in (tmp_path, path):
        with pytest.raises(ValueError, match=f"--hostfile {no_text}: cannot be read. Fix: give a"):
            read_hostfile(no_text)


def test_the_example_is_read_alike_here_and_by_deepspeed() -> None:
    example = Path(__file__).resolve().parents[2] / "launch" / "hostfile.example"
    assert read_hostfile(example) == fetch_hostfile(str(example)) == {"node-1": 8, "node-2": 8}


def test_an_empty_a_huge_and_an_open_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no host"):
        read_hostfile(write(tmp_path, "# nobody\n"))
    path = write(tmp_path, "a" * (10 * 2**20))
    with pytest.raises(ValueError, match=f"{path}: over 1,048,576 bytes"):
        read_hostfile(path)
    path = write(tmp_path, "w slots=1\n")
    path.chmod(0o666)
    with pytest.raises(ValueError, match=f"{path}: every user can write to it. Fix: chmod o-w"):
        read_hostfile(path)


def run(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    script = Path(__file__).resolve().parents[2] / "launch" / "hostfile.py"
    environment = {"PATH": f"{folder}:/usr/bin:/bin", **variables}
    return subprocess.run(
        [sys.executable, script, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_command_writes_what_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "machines").write_text("# two\nb\nc  # the last\n")
    done = run(tmp_path, "a", "--list", "machines", "--slots", "8")
    assert read_hostfile(write(tmp_path, done.stdout)) == {"a": 8, "b": 8, "c": 8}


def test_a_slurm_allocation_is_a_hostfile(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu-[7-8]" ] && echo gpu-7 && echo gpu-8'
    )
    scontrol.chmod(0o755)
    done = run(tmp_path, SLURM_JOB_NODELIST="gpu-[7-8]", SLURM_GPUS_ON_NODE="4")
    assert done.stdout == "gpu-7 slots=4\ngpu-8 slots=4\n"
    done = run(tmp_path, SLURM_JOB_NODELIST="others", SLURM_GPUS_ON_NODE="4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: scontrol show hostnames others: failed. Fix: name the machines\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: HOST: none given, and no Slurm allocation. Fix: "),
        (["a"], "error: --slots: must be the ranks of a machine, got None. Fix: "),
        (["a", "--slots", "0"], "error: --slots: must be the ranks of a machine, got 0. Fix: "),
        (["a", "--slots", "x"], "error: argument --slots: invalid int value: 'x'. Fix: "),
        (["a", "a", "--slots", "1"], "error: HOST:2: 'a slots=1' is given before. Fix: "),
        (["--slots", "1", "--", "-oProxyCommand=x"], "error: HOST:1: "),
        (["--list", "nothing", "--slots", "1"], "error: --list nothing: cannot be read. Fix: "),
    ],
)
def test_what_cannot_be_one_is_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
