"""Let it take two seconds to find out where a partition begins whose first events are deleted.

Meanwhile its position is unknown, which must not be taken for having read everything.
"""

from typing import Any

from kafka.consumer.fetcher import Fetcher

reset_offsets = Fetcher._reset_offsets_for_node  # private: the request is made nowhere else


async def slow_reset_offsets(fetcher: Any, *arguments: Any) -> None:
    await fetcher._manager._net.sleep(2)
    await reset_offsets(fetcher, *arguments)


Fetcher._reset_offsets_for_node = slow_reset_offsets
