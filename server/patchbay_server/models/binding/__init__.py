"""Where the canonical sites of a model are, derived from what one tiny forward did with its tensors.

No family's module names appear here. A residual stream is found by its sums, an attention module by its call of the
attention function, queries and keys by what that function received (at position 0 a rotary embedding is the identity),
norms by what they compute. A site that cannot be found is declared absent with the reason; `proofs` tests the others.
"""

from patchbay_server.models.binding.compare import close
from patchbay_server.models.binding.found import RESIDUAL, Binding, BlockShape, FoundSite, Widths
from patchbay_server.models.binding.stack import derive

__all__ = ["RESIDUAL", "Binding", "BlockShape", "FoundSite", "Widths", "close", "derive"]
