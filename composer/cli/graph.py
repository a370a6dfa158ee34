"""`compose graph`: which distribution of a bundle requires which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import msgspec
from rich.text import Text
from rich.tree import Tree

from composer.cli import options, render
from composer.cli.progress import drawn
from composer.model.graph import DependencyGraph, Edge, Node
from composer.steps.graph import read_graph
from composer.steps.outline import outline
from composer.store import Store


@click.command()
@options.with_options(options.TARGET, options.WORK)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def graph(*, as_json: bool, **kwargs: Any) -> None:  # noqa: ANN401
    """Show which distribution requires which, and which requirements are dropped or replaced, and why.

    By the METADATA of the wheels that are at hand; nothing is downloaded.
    """
    store = Store()
    with drawn(quiet=as_json) as listener:
        decided = outline(options.request(kwargs), store)
        found = read_graph(decided, store, jobs=options.threads(kwargs), listener=listener)
    if as_json:
        click.echo(msgspec.json.encode({"name": decided.name, "lock": decided.lock.filename, "nodes": found.nodes}))
        return
    screen = render.console()
    for tree in _trees(found):
        screen.print(tree, soft_wrap=True)
    edges = [edge for node in found.nodes for edge in node.requires or ()]
    click.echo(f"{render.counted(len(found.nodes), 'distribution')}; of {render.counted(len(edges), 'requirement')} "
               f"{sum(edge.dropped for edge in edges)} dropped, {sum(edge.replaced is not None for edge in edges)} "
               "replaced")  # fmt: skip
    if unread := [node.name for node in found.nodes if node.requires is None]:
        click.echo(f"not at hand, and so not read (see compose fetch): {', '.join(unread)}")


def _trees(found: DependencyGraph) -> list[Tree]:
    nodes = {node.name: node for node in found.nodes}
    shown: set[str] = set()
    return [_grown(Tree(Text(f"{name} {nodes[name].version}")), nodes[name], nodes, shown) for name in found.tops]


def _grown(tree: Tree, node: Node, nodes: Mapping[str, Node], shown: set[str]) -> Tree:
    """With all that the distribution requires; each is drawn once, and after that only named."""
    shown.add(node.name)
    for edge in node.kept:
        below = nodes.get(edge.name)
        again = edge.name in shown
        branch = tree.add(Text(_kept(edge, below, again=again)))
        if below and not again:
            _grown(branch, below, nodes, shown)
    for edge in node.requires or ():
        if edge.dropped:
            tree.add(Text(f"dropped: {edge.requirement}: {edge.reason}"))
    return tree


def _kept(edge: Edge, below: Node | None, *, again: bool) -> str:
    text = f"{edge.name} {below.version if below else 'is not in the bundle'} ({edge.requirement})"
    if edge.replaced:
        text += f", replaced by {edge.replaced}: {edge.reason}"
    return f"{text}, above" if again and below and below.requires else text
