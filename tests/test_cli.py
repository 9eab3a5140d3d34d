"""The command line as a user sees it: output, exit codes, one sentence per mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from derc.config import TEMPLATE
from derc.digits import FOLDER
from derc.store import Store
from tests.commands import command
from tests.conftest import small_zoo


def derc(*words, cwd=None, **environ):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "derc", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **{k: str(v) for k, v in environ.items()}},
        timeout=300,
    )


def refused(run, code, *words):
    """The run failed with this exit code and one sentence that holds the words."""
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, run.stderr


def test_help_and_import_load_no_heavy_package():
    script = (
        "import sys, derc, derc.cli\n"
        "try:\n    derc.cli.cli(['--help'], standalone_mode=False)\nexcept SystemExit: pass\n"
        "bad = {'torch', 'timm', 'onnx', 'onnxruntime', 'highspy', 'gurobipy', 'numpy'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Exit codes" in run.stdout


def test_a_process_of_its_own_says_the_same(tmp_path):
    """All other tests of what is said run in this process."""
    for words in (["compile", "--latency-ms", "0", "--json"], ["verify", tmp_path], ["zoo", "show", "--zoo", "digit"]):
        alone, here = derc(*words, cwd=tmp_path), command(*words, cwd=tmp_path)
        assert (alone.returncode, alone.stdout, alone.stderr) == (here.returncode, here.stdout, here.stderr)
        assert here.returncode and here.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--latency-ms", "0"], 2, ["--latency-ms", "positive"]),
        (["--latency-ms", "-1"], 2, ["--latency-ms", "positive"]),
        (["--latency-ms", "nan"], 2, ["--latency-ms", "positive"]),
        (["--params-m", "inf"], 2, ["--params-m", "positive"]),
        (["--zoo", "digit"], 2, ["digit", "did you mean"]),
        (["--zoo", "nowhere.toml", "--data", "digits"], 2, ["nowhere.toml"]),
        (["--zoo", "timm:resnet19", "--data", "digits"], 2, ["resnet19", "did you mean"]),
        (["--data", "folder:nowhere"], 2, ["nowhere"]),
        (["-o", "/proc/nowhere/out"], 2, ["/proc", "cannot be written"]),
        (["--data", "npz:nowhere.npz"], 2, ["nowhere.npz"]),
        (["--target", "cqu"], 2, ["cqu", "did you mean"]),
        (["--target", "a100", "--precision", "fp16"], 2, ["fp16", "fp32, int8", "not a100"]),
        (["--engine", "onnxruntim"], 2, ["onnxruntim", "did you mean"]),
        (["--engine", "openvino:bf16", "--emit", "triton"], 2, ["Triton", "openvino:bf16"]),
        (["--emit", "tritn"], 2, ["--emit", "triton"]),
        (["--solver", "cplex"], 2, ["cplex"]),
        (["--blocks", "0"], 2, ["--blocks"]),
        (["--nonsense"], 2, ["nonsense"]),
    ],
)
def test_a_wrong_request_is_one_sentence(tmp_path, words, code, says):
    refused(command("compile", "-o", tmp_path / "o", *words, cwd=tmp_path), code, *says)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"hello", "not a checkpoint"),
        (b"\x80\x04cos\nsystem\n.", "checkpoint"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path, content, says):
    zoo = small_zoo(tmp_path, "convnext")
    zoo.write_text(zoo.read_text().replace(f"{FOLDER / 'convnext'}.safetensors", "mine.pt"))
    if content is not None:
        (tmp_path / "mine.pt").write_bytes(content)
    run = command("compile", "--zoo", zoo, "--data", "digits", "-o", tmp_path / "o")
    refused(run, 2, "mine.pt", says)


def test_output_that_cannot_be_taken_is_refused_before_any_work(tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").touch()
    start = time.perf_counter()
    refused(command("compile", "-o", tmp_path / "o"), 2, "not empty")
    assert time.perf_counter() - start < 30
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["mine"]


def test_errors_are_json_too(tmp_path):
    run = command("compile", "--latency-ms", "0", "--json", "-o", tmp_path / "o")
    assert run.returncode == 2
    assert json.loads(run.stdout)["exit_code"] == 2


def test_init_writes_what_compile_reads(tmp_path):
    assert command("init", cwd=tmp_path).returncode == 0
    assert (tmp_path / "derc.toml").read_text() == TEMPLATE
    refused(command("init", cwd=tmp_path), 2, "exists")
    (tmp_path / "derc.toml").write_text('zooo = "digits"\n')
    refused(command("compile", cwd=tmp_path), 2, "zooo", "did you mean")


def test_flag_over_environment_over_file(tmp_path):
    (tmp_path / "derc.toml").write_text("latency_ms = -3.0\n")
    refused(command("compile", cwd=tmp_path), 2, "derc.toml")
    refused(command("compile", cwd=tmp_path, DERC_LATENCY_MS="-4"), 2, "DERC_LATENCY_MS")
    run = command("compile", "--latency-ms", "-5", cwd=tmp_path, DERC_LATENCY_MS="-4")
    refused(run, 2, "--latency-ms", "-5")


def test_verify_and_bench_and_wrong_bundles(compiled, tmp_path):
    folder, _, _ = compiled
    assert command("verify", folder).returncode == 0
    copy = shutil.copytree(folder, tmp_path / "copy")
    with (copy / "weights.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\x00\x01")
    refused(command("verify", copy), 8, "weights.safetensors")
    refused(command("verify", tmp_path), 8, "not a derc bundle")
    run = command("bench", folder, "--limit-s", "4", "--json")
    found = json.loads(run.stdout)
    assert set(found["latency"]) == {"engine", "eager PyTorch", "resnet-slim", "convnext", "vit-patch8"}
    assert found["latency"]["eager PyTorch"]["ratio_to_engine"] > 1
    assert found["within_budget"] is True


def test_looking_commands(compiled, tmp_path):
    _, _, zoo = compiled
    shown = json.loads(command("zoo", "show", "--zoo", zoo, "--json").stdout)
    refused(command("partition", "--zoo", zoo), 2, "--data is missing")
    assert set(shown["donors"]) == {"resnet-slim", "convnext", "vit-patch8"}
    assert all(len(d["units"]) == len(d["cuts"]) - 1 for d in shown["donors"].values())
    words = ["--zoo", zoo, "--data", "digits", "--probe", "128"]
    parts = json.loads(command("partition", *words, "--json").stdout)
    assert all(len(blocks) == 4 for blocks in parts["blocks"].values())
    assert "equivalence set 3" in command("partition", *words).stdout
    run = command("profile", *words, "--profile-s", "4", "-o", tmp_path / "table.json")
    assert run.returncode == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert sum(entry["kind"] == "block" for entry in table["entries"]) == 12
    assert any(entry["kind"] == "stitch" for entry in table["entries"])


def test_cache_commands(tmp_path):
    store = Store(tmp_path / "c")
    store.put_bytes("ab" * 32, b"x" * 100, note="test")
    assert "1 entries" in command("cache", "ls", DERC_CACHE=tmp_path / "c").stdout
    assert command("cache", "verify", DERC_CACHE=tmp_path / "c").returncode == 0
    (blob,) = (tmp_path / "c").rglob("data.bin")
    blob.chmod(0o644)
    blob.write_bytes(b"y" + blob.read_bytes()[1:])
    refused(command("cache", "verify", DERC_CACHE=tmp_path / "c"), 8, "damaged")
    assert "removed 1" in command("cache", "gc", DERC_CACHE=tmp_path / "c").stdout
    assert command("cache", "verify", DERC_CACHE=tmp_path / "c").returncode == 0


def test_a_damaged_store_entry_is_said_and_made_anew(compiled, tmp_path):
    _, _, zoo = compiled
    words = ["partition", "--zoo", zoo, "--data", "digits", "--probe", "64"]
    assert command(*words, DERC_CACHE=tmp_path / "c").returncode == 0
    for blob in (tmp_path / "c").rglob("*.safetensors"):
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.chmod(0o644)
        blob.write_bytes(data)
    run = command(*words, DERC_CACHE=tmp_path / "c")
    assert run.returncode == 0
    assert "damaged" in run.stderr or "not what was" in run.stderr


def test_an_interrupt_in_code_made_from_text_has_the_exit_code_too(tmp_path):
    """As `python -m derc` ends, which is not how a script does; what is registered at exit is still done."""
    (tmp_path / "stopped.py").write_text(
        "import atexit, pathlib, sys\n"
        "from derc import cli\n"
        "class Stopped:\n"
        "    def __call__(self, **_):\n"
        "        atexit.register(pathlib.Path(sys.argv[1]).touch)\n"
        "        exec('raise KeyboardInterrupt')\n"
        "cli.cli = Stopped()\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-m", "stopped", str(tmp_path / "done")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 130 and "interrupted" in run.stderr and "Traceback" not in run.stderr
    assert (tmp_path / "done").exists()


def test_ctrl_c_leaves_nothing_and_the_same_command_goes_on(tmp_path):
    """Pressed while it begins, and again while it works."""
    zoo = small_zoo(tmp_path, "resnet-slim", "convnext")
    words = [sys.executable, "-m", "derc", "compile", "--zoo", zoo, "--data", "digits", "--evaluations", "1"]
    words += ["--probe", "64", "--profile-s", "3", "-o", tmp_path / "o"]
    environ = {**os.environ, "DERC_CACHE": str(tmp_path / "c")}
    for after_s in (2.0, 6.0):
        process = subprocess.Popen(list(map(str, words)), env=environ, stderr=subprocess.PIPE, text=True)
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "interrupted" in stderr
        assert "Traceback" not in stderr
        assert not (tmp_path / "o").exists()
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".o")] == []
    again = subprocess.run(list(map(str, words)), env=environ, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "o" / "manifest.json").exists()
