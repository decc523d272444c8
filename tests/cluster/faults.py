"""What befalls a rollout from outside: an image that is nowhere, an API server that is away."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import operators
from doors import Door
from operators import PATIENCE_S, Loop, until

from perennial.records import Phase

# 60 in 'make test-full'.
AWAY_S = float(os.environ.get("PERENNIAL_TEST_AWAY_S", "15"))


def without_image(loop: Loop, numbers: Iterator[int]) -> None:
    """A version that cannot start leaves traffic on stable, and its resource says why."""
    loop.image = "dev.local/nowhere:1"
    process = loop.start()
    try:
        before, version = loop.serving(), next(numbers)
        wished = loop.wish(version)
        until(lambda: "Pull" in _waits(loop, version), 60, loop.log)
        state = loop.until_over(wished)
    finally:
        loop.image = operators.IMAGE
        process.terminate()
        process.wait(20)

    assert state.phase is Phase.ROLLED_BACK
    assert f"was not ready within {PATIENCE_S:g} s" in state.reason and "Pull" in state.reason
    assert (loop.serving(), set(loop.ask(20))) == (before, {before})


def cut_off(loop: Loop, numbers: Iterator[int], kubeconfig: Path, folder: Path) -> None:
    """Without the API server nothing moves in a canary; with it the same operator goes on."""
    door = Door(kubeconfig, folder)
    process = loop.start(door.kubeconfig)
    if not loop.serving():
        loop.serve(next(numbers))
    wished = loop.wish(next(numbers))
    with loop.clients() as said:
        until(lambda: loop.state(wished).phase is Phase.CANARY, 4 * PATIENCE_S, loop.log)
        door.shut()
        # What was under way when it went may still arrive.
        time.sleep(1)
        shares = loop.given()
        time.sleep(AWAY_S)
        kept = loop.given(), loop.state(wished).phase
        why = loop.log()
        door.open()
        state = loop.until_over(wished)
    ended = process.poll()
    process.terminate()
    process.wait(20)
    door.close()

    assert kept == (shares, Phase.CANARY)
    assert "API server" in why
    assert ended is None, "it got over it without being started again"
    assert state.phase is Phase.PROMOTED, state.reason
    assert not [who for who in said if who.startswith("nobody")]


def _waits(loop: Loop, version: int) -> str:
    status = loop.resource(f"retail-v{version}").get("status", {})
    said = status.get("conditions", ())
    return next((c["message"] for c in said if c["type"] == "Progressing"), "")
