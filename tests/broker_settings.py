"""Settings of the tests' brokers, on top of those in docker-compose.yml."""

from broker import Broker

# An idle broker adds a record to its own metadata twice a second, which takes a third of its time.
# The 50 partitions of the topic for the groups' offsets take time to be created and restored.
LIGHT = {"KAFKA_METADATA_MAX_IDLE_INTERVAL_MS": "0", "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "3"}
# After a kill -9, the controller lets a broker return when its session is over, 9 s by default.
# A broker that is slow, as the machine is busy, is not to be declared dead.
FAST_RETURN = LIGHT | {
    "KAFKA_BROKER_SESSION_TIMEOUT_MS": "4000",
    "KAFKA_BROKER_HEARTBEAT_INTERVAL_MS": "300",
}


def add_listener(
    broker: Broker, name: str, protocol: str, address: str, advertised: str | None = None
) -> None:
    """Give a broker that is not running yet one more listener, advertised as it is by default."""
    settings = broker.environment
    settings["KAFKA_LISTENERS"] += f",{name}://{address}"
    settings["KAFKA_ADVERTISED_LISTENERS"] += f",{name}://{advertised or address}"
    settings["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"] += f",{name}:{protocol}"
