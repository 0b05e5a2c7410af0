"""The command with an ssh and a pdsh that only tell what they were given."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from deepspeed.launcher.runner import parse_args

from launch.cluster import SSH, check_arguments, check_reach, main
from training.rendezvous import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with stand-ins for ssh and pdsh; what they are given comes into its file `told`."""
    for name in ("ssh", "pdsh"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        tell = f'echo "{name} $PDSH_SSH_ARGS_APPEND $@" >> "{tmp_path}/told"'
        path.write_text(f"#!/bin/sh\n{tell}\necho 10.0.0.1\n")
        path.chmod(0o755)
    (tmp_path / "hostfile").write_text("node-1 slots=2\nnode-2 slots=2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.setattr("deepspeed.launcher.runner.DEEPSPEED_ENVIRONMENT_PATHS", ["."])
    return tmp_path


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "cluster.py"), "--hostfile", "hostfile"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)


def test_it_is_deepspeed_where_nothing_is_wrong(shells: Path) -> None:
    (shells / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nA=b c\n")
    done = start("train.py", "--model", "gpt2", "--sample_prompt", "Once upon a time,")
    told = (shells / "told").read_text()
    assert done.returncode == 0, done.stderr
    assert "pdsh -o ServerAliveInterval=5 -S -f 1024 -w node-1,node-2" in told
    assert 'export GLOO_SOCKET_IFNAME=eth0; export A="b c";' in told
    assert told.rstrip().endswith('train.py --model gpt2 --sample_prompt "Once upon a time,"')


@pytest.mark.parametrize("given", [["--hostfile=hostfile"], ["-H", "hostfile"]])
def test_a_hostfile_with_a_byte_order_mark_names_the_same_machines(
    shells: Path, given: list[str]
) -> None:
    text = (shells / "hostfile").read_bytes()
    (shells / "hostfile").write_bytes(b"\xef\xbb\xbf" + text)
    command = [sys.executable, str(ROOT / "launch" / "cluster.py"), *given, "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "-w node-1,node-2" in (shells / "told").read_text()


@pytest.mark.parametrize(
    ("arguments", "files", "variables", "said"),
    [
        (["train.py"], {"hostfile": "-oProxyCommand=touch${IFS}x slots=1"}, {}, "hostfile:1: "),
        (["train.py", "--run_dir", "$(id)"], {}, {}, "'$(id)': a shell"),
        (["train.py"], {}, {"NCCL_X": "a", "UCX_X": "a$(id)"}, "UCX_X: a shell"),
        (["train.py"], {".deepspeed_env": "A=b\nC;id=d\n"}, {}, ".deepspeed_env:2: 'C;id=d'"),
    ],
)
def test_what_a_shell_would_act_upon_reaches_none(
    shells: Path,
    arguments: list[str],
    files: dict[str, str],
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in files.items():
        (shells / name).write_text(text)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert main(["--hostfile", "hostfile", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert ". Fix: " in line
    assert not (shells / "told").exists()


@pytest.mark.parametrize(
    "argument",
    ["--run_dir=`id`", "a;reboot", 'a"b', "a'b", "a\nb", "a&b", "a|b", "a>b", "node@$(id)"],
)
def test_so_does_no_argument_of_that_kind(argument: str) -> None:
    with pytest.raises(ValueError, match=r"a shell on another machine would act upon it\. Fix: "):
        check_arguments(["train.py", argument])


def test_a_hostfile_that_is_not_there_is_no_single_machine(
    shells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shells / "hostfile").unlink()
    assert main(["--hostfile", "hostfile", "train.py"]) == 2
    assert "error: --hostfile hostfile: no such file. Fix: " in capsys.readouterr().err


def test_a_launcher_of_many_machines_without_any_is_no_run_on_this_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--launcher", "slurm", "train.py", "--model", "debug"]) == 2
    assert "error: --launcher slurm: no hosts. Fix: give a --hostfile" in capsys.readouterr().err


def test_hosts_that_ssh_does_not_reach_are_all_named(
    shells: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shells / "hostfile").write_text("".join(f"node-{i} slots=2\n" for i in range(1, 9)))
    (shells / "bin" / "ssh").write_text(
        '#!/bin/sh\ncase "$*" in *node-[2348]*) ;; *) exit 0;; esac\n'
        'case "$*" in *node-2*) sleep 100;; *node-3*) exit 1;; esac\n'
        "echo a banner >&2; printf 'Permission denied (publickey).\\r\\n' >&2; exit 255\n"
    )
    assert " -k 1 7 ssh " in SSH  # with the time to start, it is below 10 s
    monkeypatch.setattr("launch.cluster.SSH", SSH.replace(" 7 ", " 1 "))
    assert main(["--hostfile", "hostfile", "--exclude", "node-8", "train.py"]) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines == [
        "node-2: no answer within 7 s",
        "node-3: ssh fails",
        "node-4: Permission denied (publickey).",
    ]
    assert last.startswith("error: --hostfile hostfile: ssh does not reach 3 of 7 hosts. Fix: ")


def test_a_thousand_hosts_are_probed(
    shells: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shells / "bin" / "timeout").write_text("#!/bin/sh\necho no >&2; exit 255\n")
    (shells / "bin" / "timeout").chmod(0o755)
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "")
    args = parse_args(["train.py"])
    with pytest.raises(ValueError, match="ssh does not reach 1000 of 1000 hosts"):
        check_reach(args, [f"node-{i}" for i in range(1000)])
    assert capsys.readouterr().err.splitlines() == [f"node-{i}: no" for i in range(1000)]


def test_the_probe_has_the_arguments_of_the_run(
    shells: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i key")
    check_reach(parse_args(["--ssh_port", "2222", "train.py"]), ["alice@node_1", "node-2"])
    told = (shells / "told").read_text().splitlines()
    assert [line.split("ControlPersist=no ")[1] for line in sorted(told)] == [
        "-i key -p 2222 alice@node_1 true",
        "-i key -p 2222 node-2 true",
    ]


@pytest.mark.parametrize(
    ("hosts", "arguments"),
    [
        (["localhost"], []),
        (["127.0.0.1"], []),
        ([os.uname().nodename], []),
        (["node-1", "node-2"], ["--no_ssh", "--node_rank", "0", "--master_addr", "node-1"]),
        (["node-1", "node-2"], ["--no_ssh", "--node_rank", "0"]),
        (["node-1", "node-2"], ["--no_ssh_check"]),
        (["node-1", "node-2"], ["--launcher", "SLURM"]),
    ],
)
def test_what_needs_no_ssh_is_not_probed(
    shells: Path, hosts: list[str], arguments: list[str]
) -> None:
    args = parse_args([*arguments, "train.py"])
    check_reach(args, hosts)
    assert not (shells / "told").exists()
    assert args.no_ssh_check


SSHD = "/usr/sbin/sshd"


@pytest.mark.skipif(not (os.path.exists(SSHD) and os.getuid() == 0), reason="needs sshd, root")
def test_a_real_ssh_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("user", "machine"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)]
        subprocess.run(command, check=True)
    port = free_port()
    (tmp_path / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/machine\nStrictModes no\n"
        f"UsePAM no\nPidFile none\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        "PermitRootLogin yes\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    ours = f"-F /dev/null -i {tmp_path}/user -o UserKnownHostsFile={tmp_path}/known"
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", f"{ours} -o StrictHostKeyChecking=accept-new")
    args = parse_args(["--ssh_port", str(port), "train.py"])
    with subprocess.Popen([SSHD, "-D", "-e", "-f", tmp_path / "config"], stderr=PIPE) as daemon:
        assert daemon.stderr
        assert b"Server listening" in daemon.stderr.readline()
        try:
            check_reach(args, ["127.0.0.1", "root@127.0.0.1"])
            hosts = ["127.0.0.1", "nobody_here@127.0.0.1", "127.0.0.2", "no-such.invalid"]
            with pytest.raises(ValueError, match="ssh does not reach 3 of 4 hosts"):
                check_reach(args, hosts)
        finally:
            daemon.kill()
    denied, refused, unknown = capsys.readouterr().err.splitlines()
    assert denied.startswith("nobody_here@127.0.0.1: nobody_here@127.0.0.1: Permission denied (")
    assert refused == f"127.0.0.2: ssh: connect to host 127.0.0.2 port {port}: Connection refused"
    assert unknown.startswith("no-such.invalid: ssh: Could not resolve hostname no-such.invalid: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--include", "node-9"], "--include node-9: Hostname 'node-9' not found in hostfile. "),
        (["-i", "node-1:0,2"], "--include node-1:0,2: No slot '2' specified on host 'node-1'. "),
        (["--exclude", "node-1@n:1"], "--exclude node-1@n:1: Hostname 'n' not found in hostfile"),
        (["-e", "node-1@node-2"], "--exclude node-1@node-2: leaves no host. "),
        (["-i", "node-1:x"], "--include node-1:x: invalid literal"),
        (["-i", "node-1", "-e", "node-2"], "--include node-1: include_str and exclude_str are"),
    ],
)
def test_a_filter_that_fits_no_host_is_named(
    shells: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--hostfile", "hostfile", *arguments, "train.py"]) == 2
    assert f"error: {said}" in capsys.readouterr().err
    assert not (shells / "told").exists()


def test_without_a_hostfile_the_flag_is_named_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--include", "node-9:0", "train.py"]) == 2
    assert "error: --include node-9:0: Hostname 'node-9' not found" in capsys.readouterr().err


def test_users_and_filters_reach_pdsh(shells: Path) -> None:
    text = "alice@node_1 slots=4 max_slots=8 # a\nbob@node_2 slots=4\nnode_3 slots=4\n"
    (shells / "hostfile").write_text(text)
    done = start("--include", "node_1:1@node_2", "train.py")
    told = (shells / "told").read_text()
    assert done.returncode == 0, done.stderr
    assert "-w alice@node_1,bob@node_2 " in told
    world = re.findall(r"--world_info=(\S+)", told)[0]
    slots = {"alice@node_1": [1], "bob@node_2": [0, 1, 2, 3]}
    assert json.loads(base64.urlsafe_b64decode(world)) == slots


def test_a_launcher_without_users_refuses_one(
    shells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shells / "hostfile").write_text("alice@node-1 slots=2\nnode-2 slots=2\n")
    assert main(["--hostfile", "hostfile", "--launcher", "mpich", "train.py"]) == 2
    assert "error: --launcher mpich: takes no user@host. Fix: set User" in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file to another user: as root only")
def test_an_environment_file_of_somebody_else_is_refused(
    shells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shells / ".deepspeed_env"
    path.write_text("A=b\n")
    os.chown(path, 12345, 12345)
    assert main(["--hostfile", "hostfile", "train.py"]) == 2
    assert ".deepspeed_env: belongs to another user. Fix: " in capsys.readouterr().err
    assert not (shells / "told").exists()
