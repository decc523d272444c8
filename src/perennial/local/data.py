"""Break a file on purpose, to see what validation says about it."""

from pathlib import Path

from perennial.data import breaks


def break_(
    source: Path,
    fault: str,
    to: Path,
    *,
    column: str,
    other: str,
    share: float | None,
    seed: int,
    header: bool,
) -> int:
    """Write a broken copy of a file and say what a good validation would name."""
    done = breaks.write(
        source, fault, to, column=column, other=other, share=share, seed=seed, header=header
    )
    where = f" in {done.column}" if done.column else ""
    print(f"wrote {done.path}: {done.fault.name}{where} ({done.fault.what})")
    named = f"the column {done.column}" if done.fault.named == "the column" else done.fault.named
    print(f"a validation that stops it names {named}")
    return 0


def listing() -> int:
    """One line a fault: its name, what it does, what it wants, the share of rows by default."""
    width = max(map(len, breaks.names()))
    for fault in breaks.FAULTS:
        wants = f"; wants {fault.needs}" if fault.needs else ""
        print(f"{fault.name:{width}}  {fault.what}{wants} ({fault.share:.0%})")
    return 0
