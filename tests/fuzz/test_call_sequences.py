"""Random call sequences on one cache, a bounded run; `make fuzz` runs for longer."""

from fuzz.machine import CallSequences
from hypothesis import HealthCheck, settings

CallSequences.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestCallSequences = CallSequences.TestCase
