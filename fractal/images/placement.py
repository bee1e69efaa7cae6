"""Whether an image is built here and pushed, or built on the instance: by what has to be sent, and how fast. Pure."""

from dataclasses import dataclass

# Compressed bytes of an image's layers, and what a build takes; docs/log.md, 2026-11-25: 969 MB in 79 s and 4,803 MB in
# 115 to 173 s with two processors. With more than eight the downloads decide.
COMPRESSED_BYTES = {"sandbox": 31e6, "pipeline-cpu": 969e6, "pipeline": 4803e6}
BYTES_PER_S = 8e6  # of compressed layers, built by one processor
MOST_PROCESSORS = 8
START_S = 10.0  # of a build that has nothing to do


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the choice depends on."""

    host: str
    engine_here: bool
    built_here: bool
    same_processor: bool  # of the kind that the instance has
    push_bytes: float  # compressed, of the layers that the instance lacks
    context_bytes: float  # what a build there is sent
    uplink_bits_per_s: float
    processors_here: int
    processors_there: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Where to build, and the reckoning as a part of a sentence."""

    there: bool
    reason: str


def build_s(compressed_bytes: float, processors: int) -> float:
    """Seconds that a build takes, about, downloads included."""
    return START_S + compressed_bytes / (BYTES_PER_S * max(1, min(processors, MOST_PROCESSORS)))


def here_s(facts: Facts) -> float:
    """Seconds until an image built here is on the instance."""
    build = 0.0 if facts.built_here else build_s(facts.push_bytes, facts.processors_here)
    return build + 8 * facts.push_bytes / facts.uplink_bits_per_s


def there_s(facts: Facts) -> float:
    """Seconds until an image built there is ready."""
    return build_s(facts.push_bytes, facts.processors_there) + 8 * facts.context_bytes / facts.uplink_bits_per_s


def choose(facts: Facts) -> Choice:
    """Where the image is ready sooner; on the instance where this machine cannot build it."""
    there = f"{facts.context_bytes / 1e6:,.1f} MB to send and {_minutes(there_s(facts))} in all"
    if not facts.engine_here:
        return Choice(True, f"there is no Docker here; on {facts.host} {there}")
    if not facts.same_processor:
        return Choice(True, f"{facts.host} has another kind of processor; there {there}")
    here = f"{facts.push_bytes / 1e6:,.1f} MB to send and {_minutes(here_s(facts))} in all"
    speed = f"{facts.uplink_bits_per_s / 1e6:,.1f} Mbit/s up"
    return Choice(there_s(facts) < here_s(facts), f"built there {there}, built here {here}, at {speed}")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def missing_bytes(key: str, layers: dict[str, int], there: set[str]) -> float:
    """Compressed bytes of those layers that the instance lacks.

    `layers`: diff id -> bytes, of the image here, empty if it is not here; `there`: diff ids of layers on the instance.
    """
    whole = COMPRESSED_BYTES.get(key, 100e6)
    total = sum(layers.values())
    if not total:
        return whole
    return whole * sum(size for layer, size in layers.items() if layer not in there) / total
