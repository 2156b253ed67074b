"""Apply patches of kafka-python, then run a script as Python itself would.

python tests/patches/run.py '{"readers.slow_polls": 0.05}' processor.py --once

Each key names a module in this folder and a function in it, which is called with the value.
"""

import importlib
import json
import runpy
import sys


def main() -> None:
    patches = json.loads(sys.argv[1])
    del sys.argv[:2]
    for name, value in patches.items():
        module, _, function = name.partition(".")
        getattr(importlib.import_module(module), function)(value)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
