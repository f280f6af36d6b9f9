"""`halve upcycle`."""

from pathlib import Path
from typing import Annotated

import typer

from halve.cli.screen import ShellProgress, print_json

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def upcycle(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense model: a directory, or ORG/NAME.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the sparse model goes.")],
    experts: Annotated[int, typer.Option(help="Copies of each feed-forward.")] = 8,
    active: Annotated[int, typer.Option(help="Of them that a token runs through.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the routers' first weights.")] = 0,
    json: Json = False,
) -> None:
    """Copy a dense model's feed-forwards into experts of a Mixtral, to train it on from there."""
    from halve.api.sparse import upcycle as verb
    from halve.core.record import to_dict

    made = verb(model, out, experts=experts, active=active, seed=seed, progress=ShellProgress())
    if json:
        print_json(to_dict(made))
        return
    typer.echo(
        f"{made.path}: {made.experts} experts, {made.active} for a token; {made.parameters:,} parameters, of which "
        f"{made.active_parameters:,} run for a token (the dense model has {made.dense_parameters:,})\n"
        "it computes what the dense model computes until it is trained on"
    )
