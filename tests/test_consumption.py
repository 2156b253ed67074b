"""Consumers: each event is printed at least once, and committed only after it was printed."""

import signal
import threading
from collections import Counter

from events import event, event_line, event_lines
from proxy import OFFSET_COMMIT, Proxy
from scripts import Start, assert_clean_stop, printed_lines, send_events, wait_until
from witness import Witness


def test_a_restart_repeats_and_misses_nothing(start: Start, witness: Witness) -> None:
    producers, consumers = [], []
    for _ in range(2):
        producers.append(send_events(start, 300))
        log_ends = {message.partition: message.offset + 1 for message in witness.messages()}
        consumers.append(start("consumer.py"))
        sent = printed_lines(*producers)
        wait_until(lambda: printed_lines(*consumers) == sent, "the new events are printed")
        wait_until(lambda: witness.committed() == log_ends, "they are committed")
        producers.append(send_events(start, 300))
        sent = printed_lines(*producers)
        wait_until(lambda: printed_lines(*consumers) == sent, "so are those that arrive later")
        assert_clean_stop(consumers[-1])
    assert printed_lines(*consumers) == printed_lines(*producers)


def test_joining_and_leaving_repeats_nothing(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumers = [start("consumer.py")]
    for _ in range(3):
        printed = len(printed_lines(*consumers))
        wait_until(lambda: len(printed_lines(*consumers)) > printed + 50, "events are printed")
        consumers.append(start("consumer.py"))
        wait_until(lambda: consumers[-1].lines, "the new consumer prints some")
        assert_clean_stop(consumers[-2])
    assert_clean_stop(producer)
    sent = printed_lines(producer)
    wait_until(lambda: len(printed_lines(*consumers)) >= len(sent), "all events are printed")
    assert_clean_stop(consumers[-1])
    assert printed_lines(*consumers) == sent


def test_no_event_is_lost_when_a_consumer_is_killed(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    killed, survivor = start("consumer.py"), start("consumer.py")
    wait_until(lambda: witness.group_is_balanced(2), "they share the partitions")
    wait_until(lambda: len(killed.lines) > 50 and len(survivor.lines) > 50, "both are at work")
    killed.stop(signal.SIGKILL)
    committed = witness.committed()
    wait_until(lambda: witness.group_is_balanced(1), "the survivor has all partitions", 20)
    assert_clean_stop(producer)
    log = witness.messages()
    everything = {*event_lines(log)}
    # The last line of the killed consumer may be cut off; `lines` does not contain it then.
    wait_until(lambda: {*killed.lines, *survivor.lines} == everything, "no event is missing")
    assert_clean_stop(survivor)
    assert Counter(survivor.lines).most_common(1)[0][1] == 1
    before_commit = {event_line(m) for m in log if m.offset < committed.get(m.partition, 0)}
    assert not before_commit & {*killed.lines} & {*survivor.lines}


def test_ctrl_c_during_an_unanswered_commit(start: Start, witness: Witness, proxy: Proxy) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())])
    answer = threading.Event()
    proxy.pass_response = lambda api_key: api_key != OFFSET_COMMIT or answer.wait()
    consumer = start("consumer.py", address=proxy.address)
    wait_until(lambda: consumer.lines, "the event is printed")
    assert consumer.stop(timeout=15) == 0  # about 10 s
    answer.set()
