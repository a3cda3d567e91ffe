"""Hidden states and heads of transformers models, for the loss.

::

    hidden = last_hidden_state(model, input_ids, attention_mask, keep=completion.shape[1])
    out = fg.gopd_loss(head_of(model, hidden), teacher, ref, completion)

The model's own forward runs while its head is replaced by a module that records its input. So the hidden states include
whatever a family does between body and head: a division, a projection, a wrapper's images, adapters of PEFT. What the
model's code does to the outputs of its head (a factor, a softcap, removed rows) is measured: the code is given known
numbers in place of logits, by :func:`last_hidden_state` in the forward that it runs anyway, and by :func:`head_of` in a
forward without the body. Code with any other effect than that of a :class:`fused_gopd.LinearHead` is an error, and so
are hooks, which would have no effect here.

``docs/integrations/transformers.md`` lists the families and has recipes. :mod:`.causal` finds the model and its head,
:mod:`.transform` measures what follows the head, :mod:`.weights` finds its weight, :mod:`.states` and :mod:`.patch`
have the public functions.
"""

from __future__ import annotations

from functools import partial

from ...installing import packages
from .. import needs

with needs(__name__, "transformers", install=partial(packages, "transformers>=5.0")):
    from .patch import PatchedLMHead, patch_lm_head
    from .states import head_of, last_hidden_state, position_ids_of

__all__ = ["PatchedLMHead", "head_of", "last_hidden_state", "patch_lm_head", "position_ids_of"]
