from pathlib import Path

import pytest

from launch.environment import main, needed_variables, read_environment_file


def test_what_ranks_need_is_written_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + 30 * "a"
    monkeypatch.setattr(
        "os.environ",
        {
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_DEBUG": "INFO",
            "HF_HOME": "/a b",
            "EDITOR": "vi",
            "HF_TOKEN": secret,
            "HF_X": secret,
            "OMP_NUM_THREADS": "4",
            "PATH": "/bin",
        },
    )
    out = tmp_path / ".deepspeed_env"
    monkeypatch.setattr("sys.argv", ["", "--out", str(out)])
    assert main() == 0
    written = "GLOO_SOCKET_IFNAME=eth0\nHF_HOME=/a b\nNCCL_DEBUG=INFO\nOMP_NUM_THREADS=4\n"
    assert out.read_text() == written
    assert out.stat().st_mode & 0o777 == 0o600
    assert read_environment_file(out)["HF_HOME"] == "/a b"
    said = capsys.readouterr().err
    assert "HF_TOKEN: left out" in said
    assert "HF_X: left out" in said
    assert secret not in said


def test_lines_of_ones_own_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ".deepspeed_env"
    out.write_text("NCCL_DEBUG=WARN\nNCCL_ALGO=Ring\nMY_KEY=secret\nMASTER_ADDR=node-1")
    monkeypatch.setattr("os.environ", {"NCCL_DEBUG": "INFO"})
    monkeypatch.setattr("sys.argv", ["", "--out", str(out)])
    assert main() == 0
    assert out.read_text() == "NCCL_ALGO=Ring\nMY_KEY=secret\nMASTER_ADDR=node-1\nNCCL_DEBUG=INFO\n"
    said = capsys.readouterr().err
    assert said == "NCCL_DEBUG=INFO\nleft as they were: NCCL_ALGO, MY_KEY, MASTER_ADDR\n"


def test_a_place_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nowhere" / ".deepspeed_env"
    monkeypatch.setattr("sys.argv", ["", "--out", str(out)])
    assert main() == 2
    assert capsys.readouterr().err.startswith(f"error: --out {out}: No such file or directory. Fix")


def test_a_value_that_a_shell_would_act_upon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"NCCL_X": "$(id)"})
    with pytest.raises(ValueError, match=r"NCCL_X: a shell would act upon its value\. Fix: unset"):
        needed_variables()


@pytest.mark.parametrize("line", ["A=`id`", "A=$(id)", "A;id=b", "A", 'A="b"', "=b"])
def test_so_is_a_line_of_that_kind(tmp_path: Path, line: str) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"OK=1\n{line}\n")
    with pytest.raises(ValueError, match=rf"{path}:2: .*Fix: give a line like NAME=value"):
        read_environment_file(path)
