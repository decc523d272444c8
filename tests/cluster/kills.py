"""An operator that is killed while rollouts are open, and what must be true all the same."""

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

from operators import ERRORS, GOOD, PATIENCE_S, Loop, until

from perennial.records import Phase, RolloutState
from perennial.store import lease

# 20 in 'make test-full'.
KILLS = int(os.environ.get("PERENNIAL_TEST_KILLS", "4"))


def disturb(loop: Loop, numbers: Iterator[int], fault: str) -> None:
    """As many kills as are asked for, each while a rollout is open; when one is over, another."""
    seed = int(time.time())
    chance, process, kills = random.Random(seed), loop.start(), 0
    if not loop.serving():
        loop.serve(next(numbers))
    above: list[str] = []
    ended: list[RolloutState] = []
    late: Counter[str] = Counter()
    with loop.clients() as said:
        while kills < KILLS:
            wished = loop.wish(next(numbers), fault)
            while kills < KILLS and not loop.state(wished).phase.over:
                watched(loop, wished, chance.uniform(0.5, 8), above)
                process = killed(loop, process)
                # Nobody moves it now, so this is how the kill found it.
                kills += not loop.state(wished).phase.over
            ended.append(followed(loop, wished, above))
            if fault == ERRORS:
                late += heard_after(loop, ended[-1], said)
    process.terminate()
    process.wait(20)

    wanted = Phase.PROMOTED if fault == GOOD else Phase.ROLLED_BACK
    told = f"seed {seed}, {kills} kills in {len(ended)} open rollouts"
    print(told)
    assert [s for s in ended if s.phase is not wanted] == [], told
    assert above == [], told
    assert late == Counter(), told
    assert not [who for who in said if who.startswith("nobody")], told


def killed(loop: Loop, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Another operator in its place."""
    loop.kill(process)
    # A lease of a killed one runs out by itself; a test has no time for that.
    lease.release(loop.engine, "operator", term(loop))
    return loop.start()


def term(loop: Loop) -> int:
    with loop.engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT fence FROM leases WHERE name = 'operator'")
        return int(found.scalar() or 0)


def watched(loop: Loop, wished: RolloutState, seconds: float, above: list[str]) -> None:
    """Look for a share above the step, in what was asked for and in what is really given."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and not loop.state(wished).phase.over:
        given = loop.given()
        # The step is read after: it may have risen meanwhile, but never falls before the share.
        above += excess(loop.state(wished), given)
        time.sleep(0.1)


def excess(state: RolloutState, given: dict[str, dict[str, int]]) -> list[str]:
    """What a candidate has above its step; one that is over is on its way to all or nothing."""
    if state.phase.over:
        return []
    name, most = f"v{state.version}", state.weight if state.phase is Phase.CANARY else 0
    shares = {place: found.get(name, 0) for place, found in given.items()}
    return [f"{name}: {s} % in {p} at {most} %" for p, s in shares.items() if s > most]


def followed(loop: Loop, wished: RolloutState, above: list[str]) -> RolloutState:
    """How a rollout that nobody disturbs any more ends."""
    limit = time.monotonic() + 8 * PATIENCE_S
    while not loop.state(wished).phase.over:
        assert time.monotonic() < limit, f"it did not end; {loop.log()[-3000:]}"
        watched(loop, wished, 0.5, above)
    return loop.state(wished)


def heard_after(loop: Loop, state: RolloutState, said: Counter[str]) -> Counter[str]:
    """Answers of a rejected version after its end was told, while clients go on."""
    name = f"v{state.version}"
    until(lambda: loop.ledger.entries("retail", "rolled_back", name), 4 * PATIENCE_S, loop.log)
    until(lambda: name not in loop.ask(10), 20, loop.log)
    # What was asked before that is answered, and counted.
    time.sleep(1)
    before = said[name]
    time.sleep(2)
    return Counter({name: said[name] - before})
