"""Canvases: a row of ids, MASK where the model writes. Prompted and unconditional samples differ only in where the
MASKs are."""
import torch

from config import UserError


def build(text, prompts, gen_len, block_size):
    """Canvas (B, L) long for B prompts (list of str of the same length in tokens, "" for none).

    A model of documents starts with a given `<|endoftext|>`: a document begins here. gen_len MASKs follow the prompt
    (None: to the end of the window). A canvas longer than the window is a UserError.
    """
    rows = []
    for ids in text.encode(prompts, "the prompt"):
        given = ([] if text.end is None else [text.end]) + ids
        room = block_size - len(given)
        if room < (gen_len or 1):
            raise UserError(f"the prompt takes {len(given)} of the window's {block_size} tokens, which leaves "
                            f"{max(0, room)} of the {gen_len or 1} asked for: shorten the prompt or --gen-len")
        rows.append(given + [text.mask] * (gen_len or room))
    return torch.tensor(rows)


def finished(text, ids):
    """The text (str) of a sampled row: from after the `<|endoftext|>` that starts it to the next one."""
    ids = list(ids)
    if text.end is None:
        return text.decode(ids)
    ids = ids[1:] if ids[:1] == [text.end] else ids
    return text.decode(ids[: ids.index(text.end)] if text.end in ids else ids)
