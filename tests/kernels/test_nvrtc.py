"""What comes of CUDA C++ that is compiled at run time."""

import pytest

from polymamba.kernels import nvrtc


def test_what_nvrtc_says_is_passed_on(compiler):
    with pytest.raises(nvrtc.Unavailable, match='identifier "nothing" is undefined'):
        nvrtc.compile_source('extern "C" __global__ void f() { nothing(); }', "sm_90")


def test_machine_code_is_kept(compiler, monkeypatch, tmp_path):
    """Compiled once; whatever goes wrong with the folder only means that it is compiled again."""
    source = 'extern "C" __global__ void f() {}'
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = nvrtc._compile_or_recall(source, "sm_90")
    assert [p.suffix for p in (tmp_path / "polymamba").iterdir()] == [".cubin"]
    count = []
    compile_source = nvrtc.compile_source
    monkeypatch.setattr(nvrtc, "compile_source", lambda *a: count.append(a) or compile_source(*a))
    assert nvrtc._compile_or_recall(source, "sm_90") == code
    assert not count
    nvrtc._compile_or_recall(source, "sm_80")
    assert len(count) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc._compile_or_recall(source, "sm_90") == code
    assert len(count) == 2
