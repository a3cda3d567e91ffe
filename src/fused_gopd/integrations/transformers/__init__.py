"""Hidden states and heads of transformers models, as the loss takes them.

    hidden = last_hidden_state(model, input_ids, attention_mask, keep=completion.shape[1])
    out = fg.gopd_loss(head_of(model, hidden), teacher, ref, completion)

A model's own forward is run, with its head replaced for the time of the call by a module that records what it is given.
So whatever a family does between its body and its head (a division, a projection, the images of a wrapper, the
adapters of PEFT) is in the hidden states. What the model's code does to the outputs of its head (a factor, a softcap,
rows left out) is measured: the code is given known numbers in place of logits, by :func:`last_hidden_state` in the
forward that it runs anyway, and by :func:`head_of` in a forward whose body is replaced. Code that does something else
than a :class:`fused_gopd.LinearHead` can do is an error, never a guess; so are hooks, which would have no effect.

``docs/integrations/transformers.md`` has the families and the recipes. The modules: :mod:`.causal` finds the model and
its head, :mod:`.transform` measures what follows the head, :mod:`.weights` takes its weight, :mod:`.states` and
:mod:`.patch` are the public functions.
"""

from __future__ import annotations

from .. import needs

with needs(__name__, "transformers", install='pip install "transformers>=5.0"'):
    from .patch import PatchedLMHead, patch_lm_head
    from .states import head_of, last_hidden_state, position_ids_of

__all__ = ["PatchedLMHead", "head_of", "last_hidden_state", "patch_lm_head", "position_ids_of"]
