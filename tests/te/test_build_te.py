"""What build_te.py says about an environment it cannot build on, and when it leaves one alone."""

from __future__ import annotations

import json

import build_te
import pytest

pytestmark = pytest.mark.te


def interpreter(folder, *, output: str = "", error: str = "") -> str:
    """Write a program that answers as a Python would."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{error}' >&2\necho '{output}'\nexit {int(bool(error))}\n")
    path.chmod(0o755)
    return str(path)


def facts(**changes: object) -> str:
    known = {
        "executable": "python",
        "purelib": "/site-packages",
        "python": "cp312",
        "torch": "2.15.0",
        "cuda": "13.2",
    }
    return json.dumps({**known, **changes})


def test_the_cache_is_kept_by_torch_and_python(tmp_path):
    base = build_te.describe_base(interpreter(tmp_path, output=facts()))
    assert base.wheel_folder_name == "te-2.20.2-torch2.15.0-cp312"


def test_an_environment_without_torch_is_refused(tmp_path):
    python = interpreter(tmp_path, error="No module named torch")
    with pytest.raises(ValueError, match="cannot import torch:\nNo module named torch\nGive the"):
        build_te.describe_base(python)


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_another_cuda_is_refused(tmp_path, cuda):
    python = interpreter(tmp_path, output=facts(cuda=cuda))
    with pytest.raises(ValueError, match=rf"for CUDA {cuda}.*for CUDA 13"):
        build_te.describe_base(python)


def test_a_finished_environment_is_left_alone(tmp_path, monkeypatch):
    base = build_te.describe_base(interpreter(tmp_path, output=facts()))
    (tmp_path / build_te.STAMP).write_text(json.dumps(build_te.wanted_stamp(base)))
    monkeypatch.setattr(build_te, "create_venv", lambda *_: pytest.fail("built again"))
    build_te.build(base, tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_failed_command_shows_the_end_of_its_log(tmp_path, caplog):
    log = tmp_path / "build.log"
    with pytest.raises(build_te.subprocess.CalledProcessError):
        build_te.run(["sh", "-c", "echo cc1plus: out of memory; exit 3"], log=log)
    assert "cc1plus: out of memory" in caplog.text
