"""When nodes can run: levels, and what sharing a forward makes possible."""

from __future__ import annotations

from patchbay.ir.graph import Graph, Node, Run
from patchbay.ir.schedule import BEFORE, Moment, schedule, site_chains
from tests.ir.cards import small_card

CARD = small_card()
RUNS = (Run(((1, 2),)), Run(((3, 4),)))
EARLY, LATE = "blocks.0.resid_post", "blocks.1.resid_post"


def read(site: str, run: int) -> Node:
    return Node("site.read", (), {"site": site}, run)


def write(value: int, site: str, run: int) -> Node:
    return Node("site.write", (value,), {"site": site}, run)


def test_a_read_sees_earlier_sites_and_earlier_nodes_of_its_own_site() -> None:
    """The write before a read is the last one in forward order, then program order; later ones do not count."""
    nodes = (
        Node("const", (), {"scalar": 0.0}),
        write(0, LATE, 0),
        read(LATE, 0),
        write(0, EARLY, 0),
        write(0, LATE, 0),
        read(EARLY, 0),
        read(EARLY, 1),
    )
    chains = site_chains(Graph(RUNS, nodes), CARD)
    assert chains[2] == 1 and chains[1] == 3 and chains[4] == 1
    assert chains[5] == 3 and chains[3] is None and chains[6] is None


def test_values_that_flow_forwards_stay_in_the_level_only_when_runs_share_a_forward() -> None:
    """Early to late across runs needs no second level jointly, and one when every run goes alone."""
    graph = Graph(RUNS, (read(EARLY, 0), write(0, LATE, 1), read("logits", 1)))
    assert schedule(graph, CARD, joint=True).levels == 1
    alone = schedule(graph, CARD, joint=False)
    assert alone.levels == 2 and alone.moments[2].level == 1


def test_values_that_flow_backwards_need_another_level() -> None:
    """Late to early across runs takes two levels even in a shared forward; in a level, positions are site orders."""
    graph = Graph(RUNS, (read(LATE, 0), Node("tanh", (0,)), write(1, EARLY, 1), read("logits", 1)))
    plan = schedule(graph, CARD, joint=True)
    late = CARD.site(LATE).order
    assert plan.moments[1] == Moment(0, late, 0)
    assert plan.moments[2].level == plan.moments[3].level == 1


def test_values_of_one_run_flow_forwards_within_its_own_forward() -> None:
    """A run that feeds itself ahead needs one level, alone or not."""
    graph = Graph(RUNS, (read(EARLY, 0), write(0, LATE, 0), read("logits", 0)))
    assert schedule(graph, CARD, joint=False).levels == 1


def test_constants_need_no_forward() -> None:
    """What depends on no site exists before the first forward."""
    graph = Graph(RUNS, (Node("const", (), {"scalar": 1.0}), read(EARLY, 0), Node("add", (1, 0))))
    plan = schedule(graph, CARD, joint=True)
    assert plan.moments[0].position == BEFORE
    assert plan.moments[2] == Moment(0, CARD.site(EARLY).order, 0)


def test_the_order_puts_dependencies_first() -> None:
    """Every node comes after its arguments and after the writes that it must see."""
    nodes = (read(LATE, 1), read(EARLY, 0), write(1, EARLY, 1), read("logits", 1))
    graph = Graph(RUNS, nodes)
    plan = schedule(graph, CARD, joint=True)
    place = {i: p for p, i in enumerate(plan.order)}
    chains = site_chains(graph, CARD)
    for i, node in enumerate(nodes):
        for dependency in (*node.args, *(() if chains[i] is None else (chains[i],))):
            assert place[dependency] < place[i]
    assert place[2] < place[0]  # the read that stands first in the program still sees the earlier site's write
