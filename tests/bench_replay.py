"""Print how many schedule instructions replay per second: `python tests/bench_replay.py [instructions]`."""

import sys
import time

from planner.schedule import Durations, generate
from planner.simulate import replay_schedule


def main() -> None:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    ranks = 8
    schedule = generate("1f1b", num_ranks=ranks, num_micro_batches=max(1, wanted // (2 * ranks)))
    count = sum(map(len, schedule.programs))
    for label, durations in (
        ("latency only", Durations(latency_seconds=0.1)),
        ("queued transfers", Durations(latency_seconds=0.1, message_bytes=1.0, bytes_per_second=10.0)),
    ):
        begin = time.perf_counter()
        result = replay_schedule(schedule, durations)
        seconds = time.perf_counter() - begin
        print(
            f"{label}: {count} instructions ({len(result.table)} tasks) in {seconds:.2f} s, "
            f"{count / seconds:,.0f} instructions/s, bubble ratio {result.bubble_ratio:.6f}"
        )


if __name__ == "__main__":
    main()
