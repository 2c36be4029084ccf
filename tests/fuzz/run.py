"""Run random call sequences for a given time: `python tests/fuzz/run.py --minutes 60`.

Every round draws other sequences. A failure is shrunk, printed with the calls that lead to it, and counted; the run goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from fuzz.machine import CallSequences
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test


def main(arguments: list[str] | None = None) -> int:
    """Fuzz until the time is over; return 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--steps", type=int, default=10, help="calls in a sequence at most")
    parser.add_argument("--examples", type=int, default=40, help="sequences in a round")
    parser.add_argument("--no-shrink", action="store_true", help="print failures as they are found")
    options = parser.parse_args(arguments)
    phases = [Phase.generate] if options.no_shrink else [Phase.generate, Phase.shrink]
    chosen = settings(
        max_examples=options.examples,
        stateful_step_count=options.steps,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    begin, number, found = time.monotonic(), options.seed, 0
    while time.monotonic() - begin < 60 * options.minutes:
        try:
            run_state_machine_as_test(seed(number)(CallSequences), settings=chosen)
        except KeyboardInterrupt:
            print(f"stopped in round {number}")
            break
        except Exception as error:
            found += 1
            print(f"--- round {number}: failure {found}", flush=True)
            traceback.print_exception(error, limit=-6)
        number += 1
    minutes, busy = (time.monotonic() - begin) / 60, time.process_time() / 60
    print(f"{minutes:.1f} minutes ({busy:.1f} of CPU time), rounds {options.seed} to {number - 1}, {found} failures")
    for name, count in sorted(CallSequences.statistics.items()):
        print(f"{count:8} {name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
