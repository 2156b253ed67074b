"""Run a script with patches of kafka-python: run.py PATCH... -- SCRIPT [ARGUMENT...]

A patch is the name of a module next to this one, whose import changes kafka-python (its docstring
says how), or NAME=NUMBER: a client setting that overrides the script's own.
"""

import importlib
import runpy
import sys
from typing import Any

from kafka import KafkaConsumer, KafkaProducer


def override(client_class: Any, settings: dict[str, int]) -> None:
    """Have clients of this class created with these settings, whatever the script passes."""
    create = client_class.__init__

    def create_with_settings(self: Any, *topics: str, **configs: Any) -> None:
        known = {name: settings[name] for name in settings if name in client_class.DEFAULT_CONFIG}
        create(self, *topics, **(configs | known))

    client_class.__init__ = create_with_settings


if __name__ == "__main__":
    end = sys.argv.index("--")
    patches = [patch.partition("=") for patch in sys.argv[1:end]]
    settings = {name: int(number) for name, equals, number in patches if equals}
    override(KafkaConsumer, settings)
    override(KafkaProducer, settings)
    for name, equals, _ in patches:
        if not equals:
            importlib.import_module(name)
    sys.argv = sys.argv[end + 1 :]
    runpy.run_path(sys.argv[0], run_name="__main__")
