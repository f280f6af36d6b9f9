"""`halve upcycle`."""

from pathlib import Path
from typing import Annotated

import typer

from halve.cli.screen import ShellProgress, print_json

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def upcycle(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense model: a directory, or ORG/NAME.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the sparse model goes.")],
    experts: Annotated[int, typer.Option(help="Of each layer: copies of its feed-forward, or of slices of it.")] = 8,
    active: Annotated[int, typer.Option(help="Of them that a token runs through.")] = 2,
    width_divisor: Annotated[int, typer.Option(help="Slices that a feed-forward is cut into, an expert each.")] = 1,
    reinit: Annotated[float, typer.Option(help="Share of each expert's neurons that is drawn anew.")] = 0.0,
    cluster: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Text by whose clusters routers tell copies apart.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the routers' first weights and of what is drawn anew.")] = 0,
    json: Json = False,
) -> None:
    """Copy a dense model's feed-forwards into experts of a Mixtral, to train it on from there."""
    from halve.api.sparse import upcycle as verb
    from halve.core.record import to_dict

    made = verb(
        model,
        out,
        experts=experts,
        active=active,
        width_divisor=width_divisor,
        reinit=reinit,
        cluster=cluster,
        seed=seed,
        progress=ShellProgress(),
    )
    if json:
        print_json(to_dict(made))
        return
    typer.echo(
        f"{made.path}: {made.experts} experts, {made.active} for a token; {made.parameters:,} parameters, of which "
        f"{made.active_parameters:,} run for a token (the dense model has {made.dense_parameters:,})\n"
        + (
            "it computes what the dense model computes until it is trained on"
            if made.equal
            else f"{made.reinit:.0%} of each expert's neurons are new, so that it is not the dense model; train it on"
        )
    )


def sparsify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense model: a directory, or ORG/NAME.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the sparse model goes.")],
    experts: Annotated[int, typer.Option(help="Equal slices of each feed-forward.")] = 8,
    active: Annotated[int, typer.Option(help="Of those that are not shared, how many a token runs through.")] = 2,
    shared: Annotated[int, typer.Option(help="Of the slices, how many every token runs through.")] = 0,
    recover: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Distil from the dense model on this text afterwards.")
    ] = None,
    recover_steps: Annotated[int, typer.Option(help="Most steps of that.")] = 400,
    recover_time: Annotated[
        str | None, typer.Option(metavar="TIME", help="Most time that it may take, as 10m.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to cut and to judge on. Without it: a mixed text we ship.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which recovery reads.")] = 0,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, or a torch device.")] = "cpu",
    json: Json = False,
) -> None:
    """Cut a dense model's feed-forwards into experts without training, and say whether dense is better."""
    from halve.api.sparsify import sparsify as verb
    from halve.cli.sparse_tables import sparsified
    from halve.core.record import to_dict

    made = verb(
        model,
        out,
        experts=experts,
        active=active,
        shared=shared,
        recover_on=recover,
        recover_steps=recover_steps,
        recover_time=recover_time,
        calibration=calibration,
        seed=seed,
        device=device,
        progress=ShellProgress(),
    )
    if json:
        print_json(to_dict(made))
    else:
        sparsified(made)
