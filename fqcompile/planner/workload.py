"""Workload: how many sequences of how many tokens a replica serves at once."""

from dataclasses import dataclass

from fqcompile.errors import PlannerError
from fqcompile.planner.decoder import Decoder
from fqcompile.planner.sharding import Sharing


@dataclass(frozen=True)
class Workload:
    """`batch` sequences of one replica, each of `context` tokens: so long a prompt is read, and so
    many tokens a step of decoding attends to. A prefill's pass reads at most `chunk` tokens."""

    batch: int
    context: int
    chunk: int = 8192

    def step_rows(self, sharing: Sharing) -> int:
        """Sequences that a GPU attends to; of unequal parts the largest."""
        return -(-self.batch // sharing.attention_groups)

    def pass_tokens(self, sharing: Sharing) -> int:
        """Tokens of a prefill's pass that a GPU attends to."""
        return min(self.chunk, self.step_rows(sharing) * self.context)

    def check(self, decoder: Decoder) -> None:
        """Raise where the model has no positions for so many tokens."""
        if min(self.batch, self.context, self.chunk) < 1:
            raise PlannerError(
                f"batch {self.batch}, context {self.context}, chunk {self.chunk}: all at least 1"
            )
        if decoder.positions is not None and self.context > decoder.positions:
            raise PlannerError(
                f"context {self.context}: {decoder.name} has positions for {decoder.positions} "
                "tokens (max_position_embeddings or n_positions)"
            )
