"""The lines that scripts report on stderr, as patterns for Script.find().

Their groups are what differs from report to report.
"""

ASSIGNMENT = r"^--- (?:assigned|counting) partitions of events: ([\d, ]*\d|none)"
NO_PARTITIONS = r"^--- (?:assigned|counting) partitions of events: none"
COUNTING_ALL = r"^--- counting partitions of events: ([\d, ]+) \(all\)$"
COUNTING_PART = (
    r"^--- counting partitions of events: ([\d, ]+); other members have the rest"
    r" \(--group NAME counts all\)$"
)
CATCHING_UP = r"^--- catching up: (.+)$"
NO_CONNECTION = r"^--- no connection to (\S+) \((.+)\); retrying$"
CONNECTED = r"^--- connected to (\S+)$"
POLL_FAILED = r"^--- poll failed \((.+)\); retrying$"
REMOVED = r"^--- removed from the group; the last events may be printed again$"
OVERDUE = r"^--- oldest event unacknowledged for 5 s; (\d+) events pending$"
WAITING = r"^--- waiting up to (\d+) s for (\d+) more acknowledgements$"
DELIVERY_FAILED = r"^--- delivery failed: (.+)$"
DELIVERED = r"^--- (\d+) delivered, (\d+) failed$"
MALFORMED = r"^--- malformed events skipped: (\d+); last at partition=(\d+) offset=(\d+): (.+)$"
UNREADABLE = r"^--- cannot read events: (.+)$"
LEAVING = r"^--- leaving the group$"
NO_TOPIC = r"^--- topic events is missing or forbidden; create it: `(.+)`$"
NO_BROKER = r"^--- no broker at (\S+); start one with (.+)$"
NOT_ACCEPTED = r"^--- no broker at (\S+) accepts these settings: (.+)$"
