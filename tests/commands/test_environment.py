"""Commands in shells that are not as ours: closed streams, readers that leave, locales, platforms that are not there."""

import os
import subprocess
import sys

import jax
import pytest
from tiny import ROOT, audit_config, command_of, flags_of

from gdiff_jax.commands import flags
from gdiff_jax.errors import ConfigError

STEADY = "import sys; sys.path.insert(0, {root!r})\nfrom gdiff_jax.commands import streams\nstreams.steady()\n"


def shell(code, redirections, **env):
    """Of Python under these redirections: its exit code, and what it printed on both streams."""
    command = f'"$0" -c "$1" {redirections}'
    start = STEADY.format(root=str(ROOT))
    return subprocess.run(["sh", "-c", command, sys.executable, start + code], capture_output=True, env={**os.environ, **env})


def test_a_reader_that_leaves_stops_no_run(tmp_path):
    code = f"for k in range(20000): print('line', k)\nsys.stdout.flush()\nopen({str(tmp_path / 'end')!r}, 'w').write('done')"
    done = shell(code, "| head -1")
    assert (done.stdout, done.stderr) == (b"line 0\n", b"")
    assert (tmp_path / "end").read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_a_full_disk_that_is_printed_to_stops_no_run(tmp_path):
    """`> log` on a disk that fills up: the results may lie on another."""
    code = f"for k in range(2000): print('line', k)\nsys.stdout.flush()\nopen({str(tmp_path / 'end')!r}, 'w').write('done')"
    done = shell(code, "> /dev/full")
    assert (done.returncode, done.stderr, (tmp_path / "end").read_text()) == (0, b"", "done")


def test_what_is_printed_does_not_go_into_the_files_of_a_process_without_streams(tmp_path):
    """A file that is opened takes the lowest free number, which is that of a stream that was closed."""
    code = f"import os\nfile = open({str(tmp_path / 'records')!r}, 'w')\nprint('out')\nprint('err', file=sys.stderr)\n"
    code += "sys.stdout.flush(); os.write(1, b'native'); os.write(2, b'native')\nfile.write('rows')"
    assert shell(code, ">&- 2>&- <&-").returncode == 0
    assert (tmp_path / "records").read_text() == "rows"


def test_what_a_locale_cannot_show_is_escaped():
    ascii_only = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert shell("print('\\u03c3 \\udce9')", "", **ascii_only).stdout == b"\\u03c3 \\udce9\n"
    assert shell("print('\\u03c3 \\udce9')", "", LC_ALL="C.UTF-8").stdout == "σ \\udce9\n".encode()


def test_help_is_shown_under_the_variables_that_notebooks_and_debugging_leave():
    """Also without docstrings."""
    left = dict(MPLBACKEND="module://no.such.backend", JAX_DEBUG_NANS="1", PYTHONOPTIMIZE="2", LC_ALL="C", PYTHONUTF8="0")
    done = subprocess.run([*command_of("audit.py"), "--help"], capture_output=True, text=True, env={**os.environ, **left})
    assert "--sigma_grid" in done.stdout
    assert done.stderr == ""
    wrong = subprocess.run(
        [*command_of("audit.py")], capture_output=True, text=True, env={**os.environ, "JAX_ENABLE_X64": "so"}
    )
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: JAX does not start")
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("no plugin for cuda"), AssertionError()])
def test_a_platform_that_is_not_there_is_named(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(ConfigError, match=rf"JAX_PLATFORMS=.*{str(error) or 'AssertionError'}.*JAX_PLATFORMS=cpu"):
        flags.need_devices()
    monkeypatch.setenv("JAX_PLATFORM_NAME", "gpu")
    with pytest.raises(ConfigError, match=r"JAX_PLATFORM_NAME=gpu: .*unset JAX_PLATFORM_NAME; JAX_PLATFORMS=cpu"):
        flags.need_devices()


@pytest.mark.long
def test_nothing_warns(tiny_prior, tmp_path):
    """Python's development mode, every warning an error: of files left open, of what libraries are about to drop."""
    flags = flags_of(audit_config(tiny_prior, tmp_path / "out", methods=("dsg", "auto")))
    command = [sys.executable, "-X", "dev", "-W", "error", *command_of("audit.py")[1:], *flags]
    # A cache of its own: of one that others write to at the same time it may read half an entry, and JAX warns of that.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "report.html").is_file()
    assert "Warning" not in done.stderr
