"""How is a table shown to a person? As it is: nothing that it holds is taken for markup."""

from rich.console import Console
from rich.table import Table


def show(table: Table) -> None:
    """Print a table whose heads and cells may be anybody's words, such as ``[/b]`` or ``:ok:``."""
    Console(markup=False, emoji=False).print(table)
