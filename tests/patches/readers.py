"""Patches for consumer.py and processor.py; run.py applies them."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from kafka import KafkaConsumer, TopicPartition, errors
from kafka.consumer.fetcher import Fetcher


def lose_commits(number: int) -> None:
    """Make the first commits fail, as if the broker did not answer.

    A test sees whether these events are committed later, although no others arrive.
    """
    commit = KafkaConsumer.commit
    failures = iter(range(number))

    def commit_or_fail(self: Any, **settings: Any) -> None:
        if next(failures, None) is not None:
            raise errors.KafkaTimeoutError
        commit(self, **settings)

    KafkaConsumer.commit = commit_or_fail


def slow_polls(seconds: float) -> None:
    """Make each poll() take this much longer, and return no more than a hundred events.

    A test has the time to change something while a log is being read.
    """
    poll = KafkaConsumer.poll

    def slow_poll(self: Any, **settings: Any) -> Any:
        time.sleep(seconds)
        return poll(self, **settings, max_records=100)

    KafkaConsumer.poll = slow_poll


def fail_polls(numbers: list[int]) -> None:
    """Make polls with these numbers, from 1, raise after they have taken events from the buffer.

    kafka-python does so when it does not know the broker that is a partition's new leader. A script
    that does not seek back loses these events. Polls without events are not counted.
    """
    poll = KafkaConsumer.poll
    polls_with_events = []

    def poll_or_fail(self: Any, **settings: Any) -> Any:
        if batches := poll(self, **settings):
            polls_with_events.append(batches)
            if len(polls_with_events) in numbers:
                raise errors.UnknownBrokerIdError(2)
        return batches

    KafkaConsumer.poll = poll_or_fail


def fail_while_exists(path: str) -> None:
    """Make poll() and committed() fail while a file exists; each failure adds a byte to it.

    A test switches the failures on and off, and sees how often the script has tried.
    """

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_fail(*arguments: Any, **settings: Any) -> Any:
            try:
                with Path(path).open("r+") as file:  # unlike "a", it creates no file
                    file.seek(0, os.SEEK_END)
                    file.write(".")
            except FileNotFoundError:
                return call(*arguments, **settings)
            raise errors.KafkaTimeoutError

        return call_or_fail

    KafkaConsumer.poll = failing(KafkaConsumer.poll)
    KafkaConsumer.committed = failing(KafkaConsumer.committed)


def interrupt_after_poll(text: str) -> None:
    """Send Ctrl-C to the script when poll() has just returned an event that contains this text.

    A test sees whether the last snapshot counts what was read last.
    """
    poll = KafkaConsumer.poll

    def poll_and_interrupt(self: Any, **settings: Any) -> Any:
        batches = poll(self, **settings)
        for messages in batches.values():
            if any(text.encode() in message.value for message in messages):
                os.kill(os.getpid(), signal.SIGINT)
        return batches

    KafkaConsumer.poll = poll_and_interrupt


def slow_offset_reset(seconds: float) -> None:
    """Make it take this long to look up where a log begins.

    Until then a processor has no position in a log whose first events are deleted.
    """
    reset = Fetcher._reset_offsets_for_node

    async def slow_reset(self: Any, *arguments: Any) -> None:
        await self._manager._net.sleep(seconds)
        await reset(self, *arguments)

    Fetcher._reset_offsets_for_node = slow_reset


def grow_log(growth: int) -> None:
    """Make the log end offset greater by this number at each look.

    That is what a processor sees under a producer that it cannot outrun.
    """
    end_offsets = KafkaConsumer.end_offsets
    looks: Counter[TopicPartition] = Counter()

    def growing_end_offsets(self: Any, partitions: Any, **settings: Any) -> dict[Any, int]:
        offsets = end_offsets(self, partitions, **settings)
        grown = {p: offset + growth * looks[p] for p, offset in offsets.items()}
        looks.update(partitions)
        return grown

    KafkaConsumer.end_offsets = growing_end_offsets


def slow_snapshots(seconds: float) -> None:
    """Make it take this long to turn counts into JSON, as if there were very many users."""
    dumps = json.dumps

    def slow_dumps(*arguments: Any, **settings: Any) -> str:
        time.sleep(seconds)
        return dumps(*arguments, **settings)

    mock.patch("json.dumps", slow_dumps).start()
