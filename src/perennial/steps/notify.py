"""How did a run end, and why?"""

from perennial.ledger import Ledger
from perennial.steps.context import FAILED, Context, lease_of_runs
from perennial.store import lease

# kfp.local says SUCCEEDED, a backend COMPLETE; after a time-out a backend still says RUNNING.
SUCCESS = ("SUCCEEDED", "COMPLETE")
UNTOLD = "ended as "  # begins the reason of a run whose step said nothing


def notify(ctx: Context, status: str, message: str) -> str:
    """Append run.finished and give its state: succeeded or failed."""
    state = "succeeded" if status in SUCCESS else "failed"
    said = verdict(ctx.ledger, ctx.project.name, ctx.run)
    reason = said if state == "succeeded" else _fault(ctx) or message
    # Also a run that lost its lease tells how it ended.
    Ledger(ctx.engine).append(
        "run.finished",
        project=ctx.project.name,
        subject=ctx.run,
        body={"run": ctx.run, "state": state, "reason": reason or f"{UNTOLD}{status}"},
        now=ctx.now,
    )
    lease.let_go(ctx.engine, lease_of_runs(ctx.project.name), ctx.run)
    return state


def _fault(ctx: Context) -> str:
    faults = ctx.ledger.entries(ctx.project.name, FAILED, ctx.run)
    return f"{faults[-1].body['step']}: {faults[-1].body['reason']}" if faults else ""


def verdict(ledger: Ledger, project: str, run: str) -> str:
    """What the gate said, from its entry in the ledger; empty where it said nothing."""
    gates = ledger.entries(project, "gate", run)
    if not gates:
        return ""
    results = gates[-1].body["record"]["results"]
    broken = [r["reason"] for r in results if not r["passed"]]
    return f"refused: {'; '.join(broken)}" if broken else f"all {len(results)} limits kept"
