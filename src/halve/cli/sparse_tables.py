"""What became of a dense model that was cut into experts, as a table."""

import typer

from halve.api.sparsify import Sparsified
from halve.cli.screen import console


def sparsified(made: Sparsified) -> None:
    """Sizes, a table of all that was measured, the verdict."""
    from rich.table import Table

    routed = made.experts - made.shared
    shared = f"{made.shared} shared and " if made.shared else ""
    where = "which only Halve loads" if made.native else "which transformers loads, too"
    typer.echo(
        f"{made.path}: {made.architecture}, {where}; {shared}{made.active} of {routed} experts for a token, "
        f"{made.active_share:.1%} of each feed-forward\n{made.active_parameters:,} of {made.parameters:,} parameters "
        f"run for a token; of the dense model {made.dense_parameters:,}"
    )
    if (done := made.recovery) is not None:
        typer.echo(
            f"recovered in {done.steps} steps, {done.tokens:,} tokens, {done.seconds:.0f} s: KL {done.first_kl:.3f} to "
            f"{done.last_kl:.3f} on the text it read"
        )
    table = Table()
    table.add_column("model")
    for head in ("bytes a token", "of dense", "perplexity", "KL", "tokens/s"):
        table.add_column(head, justify="right")
    for row in made.rows:
        kl = "" if row.kl is None else f"{row.kl.value:.3g} [{row.kl.low:.3g}, {row.kl.high:.3g}]"
        speed = "" if row.decode_tok_s is None else f"{row.decode_tok_s.value:.1f}"
        table.add_row(row.name, f"{row.bytes_per_token:,}", f"{row.of_dense:.2f}", f"{row.perplexity:.2f}", kl, speed)
    console().print(table)
    typer.echo(made.verdict)
