"""Devices: what nvidia-smi prints, what CUDA_VISIBLE_DEVICES lets through, and locks that outlive the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from sftd_worker.gpus import Devices, Gpu, Locks, NoDevice, find_devices, parse_gpus, visible_gpus

SMI = "0, GPU-aaaa-1, 143771, NVIDIA H200\n1, GPU-aabb-2, 143771, NVIDIA H200\n2, GPU-cccc-3, [N/A], NVIDIA GB10\n"


def test_rows_of_nvidia_smi() -> None:
    gpus = parse_gpus(SMI)

    assert gpus[0] == Gpu(0, "GPU-aaaa-1", 143771, "NVIDIA H200")
    assert gpus[2].memory_mib == 0
    assert parse_gpus("No devices were found\n") == ()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-cccc", [2]),
        ("GPU-aa", []),  # stands for two of them
        ("1,-1,0", [1]),
        ("0,0", [0]),
    ],
)
def test_cuda_visible_devices(visible: str | None, expected: list[int]) -> None:
    assert [gpu.index for gpu in visible_gpus(parse_gpus(SMI), visible)] == expected


def test_without_gpus_there_are_cpu_slots() -> None:
    assert find_devices(device="cpu", num_wanted=None, environment={}).num_slots == 1
    assert find_devices(device="cpu", num_wanted=2, environment={}).num_slots == 2


def test_asking_for_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(NoDevice, match="CUDA_VISIBLE_DEVICES"):
        find_devices(device="cuda", num_wanted=None, environment={"CUDA_VISIBLE_DEVICES": ""})


def test_the_trainer_sees_the_devices_whose_locks_it_holds() -> None:
    devices = Devices("cuda", parse_gpus(SMI), 3)

    assert devices.visible(["gpu-GPU-cccc-3.lock", ".trainer.lock"]) == "GPU-cccc-3"


def test_a_lock_is_held_by_whoever_inherited_it(tmp_path: Path) -> None:
    first, second = Locks(), Locks()
    assert first.take(tmp_path, ["gpu-a.lock"], 1)
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code], pass_fds=first.fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout
    child.stdout.readline()
    first.let_go()

    assert not second.take(tmp_path, ["gpu-a.lock"], 1)
    child.communicate()
    assert second.take(tmp_path, ["gpu-a.lock"], 1)
    second.let_go()


def test_locks_are_taken_together_or_not_at_all(tmp_path: Path) -> None:
    first, second, third = Locks(), Locks(), Locks()
    assert first.take(tmp_path, ["a", "b"], 1)

    assert not second.take(tmp_path, ["a", "b"], 2)
    assert third.take(tmp_path, ["b"], 1)
    for locks in (first, third):
        locks.let_go()
