"""Our `kernels` folder beside Hugging Face's distribution of the same name, each case in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code, *paths):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def site(tmp_path):
    """A folder with a package `kernels` and its metadata, as pip would leave it."""
    package = tmp_path / "kernels"
    (package / "layer").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from kernels.layer import Layer\nfrom .tools import tool\n__version__ = '0.18.5'\n"
    )
    (package / "layer" / "__init__.py").write_text("class Layer: pass\n")
    (package / "tools.py").write_text("def tool(): return 'theirs'\n")
    info = tmp_path / "kernels-0.18.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    return tmp_path


def test_installed_names_and_ours_live_together(site):
    code = """
import kernels, kernels.tools, kernels.layer, kernels.gca
from kernels import Layer, tool
from kernels.layer import Layer as same
assert Layer is same and tool() == 'theirs' and kernels.__version__ == '0.18.5'
print(kernels.__file__, kernels.gca.__file__, kernels.tools.__file__)
"""
    ours, gca, tools = python(code, ROOT, site).split()
    assert Path(ours) == ROOT / "kernels" / "__init__.py"
    assert Path(gca) == ROOT / "kernels" / "gca" / "__init__.py"
    assert Path(tools) == site / "kernels" / "tools.py"


def test_alone_nothing_is_added():
    code = "import kernels; print(len(kernels.__path__), hasattr(kernels, '__version__'))"
    assert python(code, ROOT) == "1 False"


def test_transformers_is_not_misled():
    """Without the distribution transformers must not take our folder for it."""
    code = """
import importlib.util, transformers.utils.import_utils as u
print(importlib.util.find_spec('kernels') is not None, u.is_kernels_available())
"""
    assert python(code, ROOT) == "True False"


def test_transformers_sees_the_installed_one(site):
    code = """
import transformers.utils.import_utils as u
print(u._is_package_available('kernels', return_version=True))
"""
    assert python(code, ROOT, site) == "(True, '0.18.5')"
