"""Have the client try the port FIRST_PORT (an environment variable) before other addresses.

kafka-python picks one of several bootstrap servers at random.
"""

import os
import random
from collections.abc import Sequence
from typing import Any

choice = random.choice
first_ports = [int(os.environ["FIRST_PORT"])]


def choose_first_port(values: Sequence[Any]) -> Any:
    port = first_ports.pop() if first_ports and hasattr(values[0], "port") else None
    return next((value for value in values if port and value.port == port), choice(values))


random.choice = choose_first_port  # type: ignore[assignment]
