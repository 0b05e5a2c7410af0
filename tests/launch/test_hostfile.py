from pathlib import Path

import pytest

from launch.hostfile import read_hostfile


def write(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hosts_and_slots_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\nnode-2.cluster slots=8\n\n  10.0.0.1\tslots=4 \n")
    assert read_hostfile(path) == {"node-2.cluster": 8, "10.0.0.1": 4}


@pytest.mark.parametrize(
    "line",
    ["-oProxyCommand=touch${IFS}x slots=1", "w;id slots=2", "w$(id) slots=2", "w`id` slots=2",
     "w slots=0", "w", "w slots=2 # eight", "user@w slots=2", "../w slots=2", "w- slots=1",
     "a" * 300 + " slots=1", "w\x00 slots=1", "first slots=2"],
)  # fmt: skip
def test_what_is_no_host_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, f"first slots=1\n{line}\n")
    with pytest.raises(ValueError, match=f"{path}:2: .* Fix: "):
        read_hostfile(path)


def test_an_empty_a_huge_and_an_open_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no host in it"):
        read_hostfile(write(tmp_path, "# nobody\n"))
    path = write(tmp_path, "a" * (10 * 2**20))
    with pytest.raises(ValueError, match=f"{path}: over 1,048,576 bytes"):
        read_hostfile(path)
    path = write(tmp_path, "w slots=1\n")
    path.chmod(0o666)
    with pytest.raises(ValueError, match=f"{path}: every user can write to it. Fix: chmod o-w"):
        read_hostfile(path)
