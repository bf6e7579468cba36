"""The public face: what it exports is there, at once where it is asked for and not before."""

import subprocess
import sys

import pytest

import gdiff_jax as gd

HEAVY = ("diffusers", "orbax", "matplotlib", "huggingface_hub", "dp_accounting", "dm_pix", "PIL", "jinja2")


@pytest.mark.parametrize("name", gd.__all__)
def test_what_is_exported_is_there_and_is_listed(name):
    assert getattr(gd, name) is not None
    assert name in dir(gd)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        gd.no_such_name  # noqa: B018 - it is the access that fails


SCRIPT = """
import sys
import gdiff_jax as gd
assert "jax" not in sys.modules, "importing the package alone waits for JAX"
names = "attacks.infer_label theory.privacy theory.jacobian images.load_images mechanisms.Clip methods.DSG"
for name in names.split():
    value = gd
    for part in name.split("."):
        value = getattr(value, part)
"""


def test_submodules_are_there_after_importing_the_package_alone():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_what_the_help_of_the_commands_needs_is_light():
    """Each of these costs tenths of a second, which `--help` and a wrong flag need not wait."""
    script = f"import sys, gdiff_jax.commands.sweep\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
