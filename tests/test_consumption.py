"""Consumers: each event is printed at least once, and committed only after it was printed."""

import signal

from events import event, event_lines
from proxy import OFFSET_COMMIT, Proxy
from scripts import TIMEOUT, Start, assert_clean_stop, printed_lines, wait_until
from witness import Witness


def test_clean_stops_repeat_and_miss_nothing(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumers = [start("consumer.py")]
    for _ in range(3):
        printed = len(printed_lines(*consumers))
        wait_until(lambda: len(printed_lines(*consumers)) > printed + 50, "events are printed")
        consumers.append(start("consumer.py"))
        wait_until(lambda: consumers[-1].lines, "the new consumer prints some")
        assert_clean_stop(consumers[-2])
    assert_clean_stop(consumers[-1])
    consumers.append(start("consumer.py"))  # for what is sent in between, too
    assert_clean_stop(producer)
    sent = printed_lines(producer)
    wait_until(lambda: len(printed_lines(*consumers)) >= len(sent), "all events are printed")
    assert_clean_stop(consumers[-1])
    assert printed_lines(*consumers) == sent


def test_no_event_is_lost_when_a_consumer_is_killed(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    killed, survivor = start("consumer.py"), start("consumer.py")
    wait_until(lambda: len(killed.lines) > 50 and len(survivor.lines) > 50, "both are at work")
    killed.stop(signal.SIGKILL)
    wait_until(lambda: witness.group_is_balanced(1), "the survivor has all partitions", 20)
    assert_clean_stop(producer)
    everything = {*event_lines(witness.messages())}
    # The last line of the killed consumer may be cut off; `lines` does not contain it then.
    wait_until(lambda: {*killed.lines, *survivor.lines} == everything, "no event is missing")
    assert_clean_stop(survivor)
    assert len(survivor.lines) == len({*survivor.lines})


def test_ctrl_c_during_an_unanswered_commit(start: Start, witness: Witness, proxy: Proxy) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())])
    proxy.delay(TIMEOUT, OFFSET_COMMIT)
    consumer = start("consumer.py", address=proxy.address)
    wait_until(lambda: consumer.lines, "the event is printed")
    assert consumer.stop(timeout=15) == 0  # about 10 s
