"""Files of the user's own: what they import, whatever else has the same name, and that they see no command line of ours."""

import random
import sys

import jax
import pytest

from gdiff_jax.victims import own

LOSS = "import jax.numpy as jnp\ndef loss(params, x, y): return SCALE * (params['w'] * x).sum()\n"
MAKE = "import jax.numpy as jnp\nfrom {layers} import loss\ndef make(): return loss, {{'w': jnp.ones(3)}}\n"


@pytest.fixture(autouse=True)
def _as_before():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def value(name):
    """Of the loss of a victim, at ones."""
    victim, params = own.load_own(str(name), 10)
    return float(victim.loss(params, jax.numpy.ones(3), 0)) / 3


def test_each_file_has_the_neighbours_of_its_own_folder(tmp_path):
    """Also where those of two folders have the same names, and so have the files."""
    for k, scale in enumerate(("2.0", "5.0", "7.0")):
        write(tmp_path / f"{k}", my_layers=LOSS.replace("SCALE", scale), net=MAKE.format(layers="my_layers"))
    assert [value(tmp_path / f"{k}" / "net.py:make") for k in (0, 1, 2, 0)] == [2, 5, 7, 2]


def test_a_file_of_a_package_imports_its_neighbours_by_a_dot_or_by_the_packages_name(tmp_path):
    package = write(tmp_path / "my_package" / "models", __init__="", layers=LOSS.replace("SCALE", "3.0"))
    write(tmp_path / "my_package", __init__="")
    for name, layers in (("dot", ".layers"), ("full", "my_package.models.layers"), ("plain", "layers")):
        write(package, **{name: MAKE.format(layers=layers)})
        assert value(package / f"{name}.py:make") == 3, name


def test_a_neighbour_is_found_when_the_function_runs_and_later(tmp_path):
    late = "import jax.numpy as jnp\ndef make():\n    import of_make\n    def loss(p, x, y):\n        import of_loss\n"
    late += "        return of_make.SCALE * of_loss.SCALE * (p['w'] * x).sum()\n    return loss, {'w': jnp.ones(3)}\n"
    write(tmp_path, net=late, of_make="SCALE = 2.0", of_loss="SCALE = 4.0")
    assert value(tmp_path / "net.py:make") == 8


def test_a_file_takes_the_place_of_no_module_and_none_takes_its_own(tmp_path):
    write(tmp_path, jax=MAKE.format(layers="my_layers"), my_layers=LOSS.replace("SCALE", "6.0"), random="raise ImportError")
    before = sys.modules["jax"], sys.modules["random"]
    assert value(tmp_path / "jax.py:make") == 6
    assert (sys.modules["jax"], sys.modules["random"]) == before == (jax, random)
    assert str(tmp_path) in sys.path[1:]  # last: what a library imports late is its own
    assert sys.path[0] != str(tmp_path)


def test_any_name_of_a_file_will_do(tmp_path):
    write(
        tmp_path / "a folder",
        **{"my net-2 (new)": LOSS.replace("SCALE", "9.0") + "def make(): return loss, {'w': jnp.ones(3)}"},
    )
    assert value(tmp_path / "a folder" / "my net-2 (new).py:make") == 9


def test_a_file_sees_no_command_line_and_may_not_end_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["audit.py", "--victim=net.py:make"])
    parses = "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--scale', type=float, default=4.0)\n"
    parses += "SCALE = parser.parse_args().scale\n" + LOSS + "def make(): return loss, {'w': jnp.ones(3)}"
    ends = "import sys\ndef make(): sys.exit('no weights')"
    write(tmp_path, parses=parses, ends=ends, at_once="raise SystemExit(0)")
    assert value(tmp_path / "parses.py:make") == 4
    assert sys.argv == ["audit.py", "--victim=net.py:make"]
    with pytest.raises(ValueError, match=r"make\(\) failed \(SystemExit: no weights\)"):
        value(tmp_path / "ends.py:make")
    with pytest.raises(ValueError, match=r"at_once.py cannot be imported \(SystemExit: 0\)"):
        value(tmp_path / "at_once.py:make")


def test_a_module_of_the_working_folder_is_found(tmp_path, monkeypatch):
    write(tmp_path, my_own_net=MAKE.format(layers="my_layers"), my_layers=LOSS.replace("SCALE", "2.0"))
    monkeypatch.chdir(tmp_path)
    assert value("my_own_net:make") == 2
