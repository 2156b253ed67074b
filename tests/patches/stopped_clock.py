"""Stop the clock of the script, but not that of kafka-python: nothing becomes due by time.

kafka-python is imported by now and keeps the real `time`; the script imports this stand-in.
"""

import sys
import time
from types import ModuleType

stand_in = ModuleType("time")
vars(stand_in).update(vars(time), monotonic=lambda: 1_000.0)
sys.modules["time"] = stand_in
