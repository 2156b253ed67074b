"""The README's sections and code blocks, and a copy of the project to try them in."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from broker import ROOT
from scripts import TIMEOUT, Start

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """Return what follows a heading, up to the next one."""
    _, found, rest = README.partition(f"\n## {heading}\n")
    assert found, heading
    return rest.partition("\n## ")[0]


def blocks(text: str, language: str = "sh") -> list[str]:
    """Return the code blocks in a language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def copy_project(folder: Path) -> Path:
    """Copy the project into the folder, as `git clone` does; return where it is."""
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    return shutil.copytree(ROOT, folder / "kafka-practice", ignore=ignored)


def run(start: Start, folder: Path, command: str, path: str = PATH) -> str:
    """Run a block in bash, with the Python of the tests; return what it prints."""
    command = f"cd {shlex.quote(str(folder))}\n{command}"
    script = start(command=["bash", "-c", command], environment={"PATH": path})
    assert script.wait(3 * TIMEOUT) == 0, script.err
    return script.out
