"""The command with an ssh and a pdsh that only tell what they were given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import check_arguments, main

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


def test_a_host_that_ssh_does_not_reach_is_named(shells: Path) -> None:
    (shells / "bin" / "ssh").write_text("#!/bin/sh\nexit 255\n")
    done = start("train.py")
    assert done.returncode == 2
    assert "host=node-1 was not reachable" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


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
