"""An estimate's pipeline run on paper: its stage times given to the schedule simulator, to check the closed forms and to draw."""

from __future__ import annotations

from quintet.errors import SpecError
from quintet.plan.costs import Costs
from quintet.plan.estimate import Estimate
from quintet.plan.simulate import Simulation, simulate
from quintet.schedule import build


def costs_of(found: Estimate) -> Costs:
    """The stages of an estimate in the simulator's terms; all-to-alls stand in their ops, and a pair gains what the estimate says."""
    setup, stages = found.setup, found.timed.stages
    p = setup.layout.pp
    forward = sum(s.forward + s.all_to_all for s in stages) / p
    backward_input = sum(s.input + s.all_to_all + s.all_to_all_again for s in stages) / p
    weight = sum(s.weight for s in stages) / p
    stride = setup.layout.num_ranks // p
    message = setup.tokens / setup.layout.tp * setup.architecture.hidden_size * 2
    link = found.cluster.link if stride < found.cluster.domain else found.cluster.network
    return Costs(
        forward=forward,
        backward_input=backward_input,
        weight=weight,
        pair=min(1.0, found.timed.pipeline.pair / (forward + backward_input + weight)),
        profile=tuple(stage.whole for stage in stages),
        message_bytes=message,
        p2p_latency=link.latency,
        p2p_bandwidth=link.effective,
    )


def rehearse(found: Estimate, *, num_microbatches: int | None = None) -> Simulation:
    """The whole step's pipeline, or one of fewer micro-batches, simulated. Raises SpecError for a layout without stages."""
    setup = found.setup
    if setup.layout.pp == 1:
        raise SpecError("layout.pp (1): a pipeline of one stage has nothing to simulate")
    chunks = max(2, setup.chunks)
    m = num_microbatches or setup.num_microbatches
    return simulate(
        build(setup.schedule, setup.layout.pp, m + (m % 2 if setup.schedule == "dualpipe" else 0), chunks=chunks), costs_of(found)
    )
