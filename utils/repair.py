"""Repair: a draft with wrong tokens in it is improved.

A model of uniform noise takes the draft for a text with a little noise, which it is, and goes on
from there (`diffusion.sample`, draft). A masked one is asked for each token while that is masked;
those that are more likely wrong than right are masked and written anew.
"""

import torch

from utils.cli import UserError
from utils.draws import at_least_float32
from utils.sampling import Step


def begin(family, model, blank, draft, how):
    """(canvas (B, L), draft (B, L) or None) with which `diffusion.sample` improves the draft (B, L)
    long, and, where a step is needed before, that `sampling.Step`. blank (B, L): MASK at what may
    be changed; how: SampleConfig."""
    if not family.carries_over:
        if not family.sampler(how).may_remask:
            raise UserError(f"--draft is nothing for --sampler {family.sampler_name(how)}")
        return blank, draft, None
    if family.block_len:
        raise UserError(
            f"--draft wants a model of uniform noise, or a masked one that sees all of the text, "
            f"and this is {family.name}"
        )
    mask = model.vocab_size - 1
    drafts, which = draft.unique(dim=0, return_inverse=True)
    where = draft.new_empty(drafts.shape).index_copy(0, which, blank) == mask
    doubted = [doubtful(family, model, *pair, how.draft_noise) for pair in zip(drafts, where)]
    masked, nothing = torch.stack(doubted)[which], torch.zeros_like(draft, dtype=torch.bool)
    canvas, asked, editable = draft.masked_fill(masked, mask), where.sum(1)[which], blank == mask
    confidence, share = torch.where(editable, 0.0, 1.0), masked.sum(1) / editable.sum(1)
    nfe = int(asked.max())
    parts = (canvas, masked, nothing, masked, confidence, None, nfe, asked, share, True)
    return canvas, None, Step(*parts)


@torch.no_grad()
def doubtful(family, model, draft, where, share):
    """Which of the positions `where` (L,) bool of a draft (L,) are more likely wrong than right,
    (L,) bool: of a wrong token any is as likely, of a right one p(x_i | all others), for which the
    network is asked while that is masked. At least the one that is doubted most."""
    V, places = model.vocab_size - 1, where.nonzero()[:, 0]
    rows = draft.repeat(len(places), 1)
    rows[torch.arange(len(places)), places] = V
    found = []
    for part in torch.arange(len(places), device=draft.device).split(family.cfg.rows_at_once):
        index = torch.arange(len(part), device=draft.device) * len(draft) + places[part]
        logits = at_least_float32(family.logits(model, rows[part], index))
        found.append(logits.log_softmax(-1).gather(1, draft[places[part]][:, None])[:, 0])
    log_p = torch.cat(found)
    wrong = log_p.exp() * (1 - share) < share / V
    wrong[log_p.argmin()] = True
    return torch.zeros_like(where).index_put((places,), wrong)
