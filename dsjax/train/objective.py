"""What is minimised: next-token loss, MTP loss, balance losses."""

from dataclasses import dataclass

from dsjax.nn.dropping import Dropping
from dsjax.train.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The weights of everything beside next-token loss; 0 leaves a term out.

    `sequence_balance`: V3's alpha, and V2's alpha1 (the same formula on softmax
    affinities). `expert_balance`: DeepSeekMoE's alpha1, over the whole microbatch.
    `device_balance`, `communication_balance`: alpha2, alpha3, over `devices` groups of
    experts, per sequence where `sequence_balance` is used (V2), else over the
    microbatch. `bias_speed`: V3's gamma. `mtp`: V3's lambda.
    """

    sequence_balance: float = 0.0
    expert_balance: float = 0.0
    device_balance: float = 0.0
    communication_balance: float = 0.0
    devices: int = 1
    bias_speed: Schedule = 0.0
    mtp: Schedule = 0.0
    dropping: Dropping | None = None
