"""Checkpoints are written while training goes on: what they hold, who waits for them, and how they end."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.trainer.harness import Finished
from tests.trainer.test_resume import steps_done
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from sftd.protocol import TrainerJob
from sftd_worker.trainer import checkpoint
from sftd_worker.trainer.checkpoint import load_checkpoint, verify
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.model import load_model
from sftd_worker.trainer.optim import names_in_order
from sftd_worker.trainer.precision import choose_precision
from sftd_worker.trainer.run import run
from sftd_worker.trainer.sharding import choose_sharding
from sftd_worker.trainer.signals import Signals
from sftd_worker.trainer.snapshot import HostMemory, Tensors
from sftd_worker.trainer.tensorfile import write_tensors
from sftd_worker.trainer.world import World

MakeJob = Callable[..., TrainerJob]
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "max_steps": 6, "save_steps": 2}


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Call something before each file of tensors is written, in the thread that writes it; then really write it."""

    def slow(before: Callable[..., None]) -> None:
        real = checkpoint.write_tensors

        def write(path: Path, tensors: Any, *, proceed: Callable[[], None]) -> Any:
            before(proceed)
            return real(path, tensors, proceed=proceed)

        monkeypatch.setattr(checkpoint, "write_tensors", write)

    return slow


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.005)


def content(folder: Path) -> dict[str, Any]:
    """What a run goes on from: the hashes of the tensors, and the state."""
    found: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }
    return found | {"state": json.loads((folder / "trainer_state.json").read_text())}


def test_training_goes_on_while_the_checkpoint_of_an_earlier_step_is_written(
    make_job: MakeJob, slow_disk: Callable[..., None]
) -> None:
    whole, slow = make_job("whole", **FULL), make_job("slow", **FULL)
    run(whole, signals=Signals())
    output = Path(slow.output_dir)

    def until_the_next_save_waits(_: Any) -> None:
        if not (output / "checkpoints" / "checkpoint-2").exists():
            wait_until(lambda: steps_done(output) >= 4)
            time.sleep(1.1)

    slow_disk(until_the_next_save_waits)
    assert run(slow, signals=Signals()).outcome == "succeeded"

    lines = Finished(None, output).lines
    order = [(line.type, line.step) for line in lines if line.type in ("step", "checkpoint")]
    assert order.index(("step", 4)) < order.index(("checkpoint", 2)) < order.index(("step", 5))
    assert "step 4: waited" in Finished(None, output).log
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        folders = [Path(job.output_dir) / "checkpoints" / name for job in (whole, slow)]
        assert verify(folders[1])
        assert content(folders[0]) == content(folders[1])


def test_a_disk_that_fills_up_meanwhile_ends_the_run_at_its_next_step(
    make_job: MakeJob, slow_disk: Callable[..., None]
) -> None:
    job = make_job(**{**FULL, "max_steps": 50, "save_steps": 20})
    output = Path(job.output_dir)

    def fill(_: Any) -> None:
        wait_until(lambda: steps_done(output) >= 22)
        raise OSError(28, "No space left on device")

    slow_disk(fill)
    end = run(job, signals=Signals())

    assert (end.outcome, end.reason) == ("failed", "disk_full")
    assert end.message == "checkpoint of step 20: the disk is full"
    assert 22 <= steps_done(output) < 40
    assert list((output / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("save_steps", [2, 6], ids=["between steps", "after the last step"])
def test_a_cancel_does_not_wait_long_for_a_checkpoint_and_publishes_none_later(
    save_steps: int, make_job: MakeJob, slow_disk: Callable[..., None]
) -> None:
    signals, job = Signals(), make_job(**{**FULL, "save_steps": save_steps})
    started = threading.Event()

    def never_ends(proceed: Callable[[], None]) -> None:
        started.set()
        while True:
            proceed()
            time.sleep(0.01)

    def cancel() -> None:
        started.wait(60)
        signals.stop = True

    slow_disk(never_ends)
    threading.Thread(target=cancel, daemon=True).start()
    end = run(job, signals=signals)

    assert started.is_set()
    assert end.outcome == "stopped"
    lines = Finished(None, Path(job.output_dir)).lines
    assert not [line for line in lines if line.type == "checkpoint"]
    last_step = max(line.at for line in lines if line.type == "step")
    assert end.at - last_step < 3  # a cancelled trainer is killed then
    assert list((Path(job.output_dir) / "checkpoints").iterdir()) == []
    assert not (Path(job.output_dir) / "results").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "save"]


def test_a_pause_waits_for_its_checkpoint(make_job: MakeJob, slow_disk: Callable[..., None]) -> None:
    signals, job = Signals(), make_job(**{**FULL, "save_steps": 1})

    def pause(_: Any) -> None:
        signals.save_and_stop = True
        time.sleep(0.5)

    slow_disk(pause)
    end = run(job, signals=signals)

    assert end.outcome == "stopped"
    lines = Finished(None, Path(job.output_dir)).lines
    saved = [line for line in lines if line.type == "checkpoint"]
    assert saved[-1].step == steps_done(Path(job.output_dir))
    assert all(verify(Path(job.output_dir) / "checkpoints" / line.name) for line in saved)
    assert lines[-1].type == "end"


def test_without_memory_for_a_copy_training_waits_and_says_so(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, short = make_job("whole", **FULL), make_job("short", **FULL)
    run(whole, signals=Signals())
    monkeypatch.setattr("sftd_worker.trainer.snapshot.available_host_bytes", lambda: 1000)

    assert run(short, signals=Signals()).outcome == "succeeded"

    lines = Finished(None, Path(short.output_dir)).lines
    order = [(line.type, line.step) for line in lines if line.type in ("step", "checkpoint")]
    assert order.index(("checkpoint", 2)) < order.index(("step", 3))
    told = [line.message for line in lines if line.type == "notice" and "no memory" in line.message]
    assert len(told) == 1
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        left, right = (Path(job.output_dir) / "checkpoints" / name for job in (whole, short))
        assert content(left) == content(right)


def test_the_optimizers_state_is_laid_on_parameters_by_name(make_job: MakeJob) -> None:
    """Whatever the groups are made of, and a state without its parameter is refused."""
    job = make_job(**{**FULL, "max_steps": 4, "weight_decay": 0.1})
    run(job, signals=Signals())
    newest = Path(job.output_dir) / "checkpoints" / "checkpoint-2"
    state = load_file(newest / "optimizer.safetensors")
    weights = AutoModelForCausalLM.from_pretrained(newest).state_dict()
    assert {name.split("/")[0] for name in state} <= set(weights)

    net = AutoModelForCausalLM.from_pretrained(newest)
    backwards = torch.optim.AdamW(list(net.parameters())[::-1])
    model: Any = SimpleNamespace(net=net)
    load_checkpoint(newest, model=model, optimizer=backwards)
    for name, parameter in net.named_parameters():
        assert torch.equal(backwards.state[parameter]["exp_avg"], state[f"{name}/exp_avg"])

    with pytest.raises(RunFailed, match="state of a parameter that is not trained here"):
        load_checkpoint(newest, model=model, optimizer=torch.optim.AdamW(list(net.parameters())[:2]))


@pytest.mark.parametrize(
    "method",
    [{}, {"method": "lora", "lora": {"use_dora": True}}, {"optimizer": "adamw_8bit"}],
    ids=["full", "dora", "8-bit"],
)
def test_a_checkpoint_of_the_first_version_is_read(method: dict[str, Any], make_job: MakeJob) -> None:
    """There the state was laid by number, all that has two dimensions before the rest."""
    job = make_job(**{**FULL, **method, "max_steps": 4, "weight_decay": 0.1})
    ended = run(job, signals=Signals())
    newest = Path(job.output_dir) / "checkpoints" / "checkpoint-2"
    by_name = load_file(newest / "optimizer.safetensors")
    names = list(dict.fromkeys(name.split("/")[0] for name in by_name))
    dimensions = _trained(job)
    assert sorted(dimensions) == sorted(names)
    old = sorted(dimensions, key=lambda name: dimensions[name] < 2)  # keeps the order among equals
    assert old != list(dimensions)
    numbers = {name: str(number) for number, name in enumerate(old)}

    def by_number(named: dict[str, Any]) -> dict[str, Any]:
        return {f"{numbers[(parts := name.split('/', 1))[0]]}/{parts[1]}": named[name] for name in named}

    save_file(by_number(by_name), newest / "optimizer.safetensors")
    state = json.loads((newest / "trainer_state.json").read_text())
    state["optimizer"] = by_number(state["optimizer"])
    (newest / "trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["run_sha"]
    for name in ("optimizer.safetensors", "trainer_state.json"):
        written = (newest / name).read_bytes()
        manifest["files"][name] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))

    again = run(job.model_copy(update={"attempt": 2, "resume_from": str(newest)}), signals=Signals())

    assert again.outcome == "succeeded", again.message
    assert {name: file.sha256 for name, file in again.files.items() if name.endswith(".safetensors")} == {
        name: file.sha256 for name, file in ended.files.items() if name.endswith(".safetensors")
    }


def _trained(job: TrainerJob) -> dict[str, int]:
    """Dimensions of the parameters that a job trains, by name, in the model's order."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    model = load_model(
        job,
        world=world,
        sharding=choose_sharding(job.spec, world),
        precision=choose_precision(job.spec, world.device),
        resume_from=None,
    )
    return {
        name: parameter.ndim for name, parameter in model.net.named_parameters() if parameter.requires_grad
    }


def test_state_that_does_not_fit_its_parameter_is_refused(make_job: MakeJob) -> None:
    job = make_job(**{**FULL, "max_steps": 2})
    run(job, signals=Signals())
    newest = Path(job.output_dir) / "checkpoints" / "checkpoint-2"
    state = load_file(newest / "optimizer.safetensors")
    state["model.norm.weight/exp_avg"] = torch.zeros(63)
    save_file(state, newest / "optimizer.safetensors")
    net = AutoModelForCausalLM.from_pretrained(newest)
    model: Any = SimpleNamespace(net=net)

    with pytest.raises(RunFailed, match=r"norm\.weight/exp_avg has the shape \[63\], its parameter \[64\]"):
        load_checkpoint(newest, model=model, optimizer=torch.optim.AdamW(net.parameters()))


TAKE_AND_GIVE_BACK = """
import mmap
from sftd_worker.trainer.memory import expected_host_bytes

before = expected_host_bytes()
size = before + 2**29
with mmap.mmap(-1, size) as held:
    for at in range(0, size, mmap.PAGESIZE):
        held[at] = 1
    print(expected_host_bytes() < 2**26)
print(expected_host_bytes() > size - 2**26)
"""


def test_memory_that_was_held_and_given_back_is_expected_again() -> None:
    done = subprocess.run([sys.executable, "-c", TAKE_AND_GIVE_BACK], capture_output=True, text=True)

    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_copy_leaves_the_memory_that_the_steps_will_take_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Tensors({"w": torch.zeros(100)}, {}, {})
    monkeypatch.setattr("sftd_worker.trainer.snapshot.available_host_bytes", lambda: 1000)
    monkeypatch.setattr("sftd_worker.trainer.snapshot.expected_host_bytes", lambda: 400)
    assert HostMemory(torch.device("cpu"), None).reserve(tensors)

    monkeypatch.setattr("sftd_worker.trainer.snapshot.expected_host_bytes", lambda: 600)
    assert not HostMemory(torch.device("cpu"), None).reserve(tensors)


def test_a_slash_in_the_name_of_a_parameter_does_not_part_it() -> None:
    net = torch.nn.Module()
    for name in ("a/b", "a%2Fb"):
        net.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))

    names = names_in_order(net, torch.optim.AdamW(net.parameters()))

    assert len(set(names)) == 2
    assert not any("/" in name for name in names)


def test_a_checkpoint_has_the_names_and_shapes_that_transformers_saves(
    make_job: MakeJob, tiny: Path, tmp_path: Path
) -> None:
    """Experts are one tensor in memory and many on disk; the head is tied to the embedding and stands once."""
    import shutil

    shutil.copytree(tiny, tmp_path / "experts")
    (tmp_path / "experts" / "model.safetensors").unlink()
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    job = make_job(**{**FULL, "max_steps": 2, "base_model": str(tmp_path / "experts")})
    end = run(job, signals=Signals())
    assert end.outcome == "succeeded", end.message

    saved = load_file(Path(job.output_dir) / "checkpoints" / "checkpoint-2" / "model.safetensors")
    by_transformers = load_file(Path(job.output_dir) / "results" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(Path(job.output_dir) / "checkpoints" / "checkpoint-2")

    assert any("experts.3.w2" in name for name in saved)
    assert "lm_head.weight" not in saved
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in by_transformers.items()
    }
    assert all(torch.equal(saved[name], by_transformers[name]) for name in saved)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.config.use_cache is True


def test_a_file_of_tensors_is_read_by_safetensors_and_has_the_hash_it_says(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weights": torch.randn(37, 5, generator=generator),
        "turned": torch.randn(4, 6, generator=generator).T,
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "eighth": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(5, dtype=torch.int64),
        "none": torch.zeros(0, 3),
        "large": torch.randn(3_000_001, generator=generator),
    }

    file = write_tensors(tmp_path / "t.safetensors", tensors)

    data = (tmp_path / "t.safetensors").read_bytes()
    assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert torch.equal(read[name].double(), value.double()), name


def test_a_tensor_that_the_format_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"waves: .* torch.complex128"):
        write_tensors(tmp_path / "t.safetensors", {"waves": torch.zeros(2, dtype=torch.complex128)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_page_locked_and_holds_the_values_of_its_moment() -> None:
    """Work that is still queued on the device is in it, work queued after it is not."""
    device = torch.device("cuda", 0)
    weights = {"large": torch.zeros(64, 1024, 1024, device=device), "small": torch.zeros(3, device=device)}
    optimizer = {"0/step": torch.tensor(7.0), "0/exp_avg": torch.zeros(5, 5, device=device)}
    memory = HostMemory(device, None)
    tensors = Tensors(weights, optimizer, {})
    assert memory.reserve(tensors)

    for _ in range(50):
        for value in weights.values():
            value.add_(1)
    copied = memory.copy(tensors)
    for value in weights.values():
        value.add_(1)

    assert copied is not None
    assert copied.weights["large"].is_pinned()
    assert all(bool((value == 50).all()) for value in copied.weights.values())
    assert copied.optimizer["0/step"].item() == 7
