"""Judges: autoregressive models that score texts (generative NLL). Low is not good by itself:
repetition is likely too, so that the same figure of real text always stands beside it."""

import math

import torch

import diffusion
from utils import checkpoint, exported, families, runtime
from utils.cli import UserError, reason
from utils.exported import HUB


class CheckpointJudge:
    """An autoregressive checkpoint of this program."""

    def __init__(self, path, device, dtype="auto"):
        self.model, self.tokenizer, cfg = checkpoint.restore(checkpoint.read(path), device, path)
        self.family, self.device = families.family_of(cfg), device
        self.dtype = runtime.dtype_of_run(dtype, cfg.dtype, device, path)
        if not self.family.exact:
            raise UserError(
                f"{path} has objective={cfg.objective}; a judge must give exact likelihoods: ar"
            )
        self.window = cfg.seq_len
        self.begin = [] if self.tokenizer.end is None else [self.tokenizer.end]

    def encode(self, texts):
        """List of str -> list of lists of ids."""
        return self.tokenizer.encode(texts, "the samples")

    def nll(self, ids):
        """-log p of each of ids (list), which follow `begin`, in nats: (N,)."""
        row = torch.tensor([self.begin + ids], device=self.device)
        index = torch.arange(len(self.begin), row.size(1), device=self.device)
        with runtime.autocast(self.device, self.dtype):
            logits = self.family.logits(self.model, row, index)
        return diffusion.token_nll(logits, row[0, index]).cpu()


class HubJudge:
    """A causal language model of the Hugging Face hub, gpt2-large say, by `transformers`; or of a
    folder that it wrote. No code of its repository is run."""

    def __init__(self, name, device):
        try:
            import transformers
        except ImportError:
            raise UserError(
                f"judge={HUB}{name} needs the package transformers: pip install transformers"
            ) from None
        runtime.quiet_hub()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, trust_remote_code=False
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True
            )
        except Exception as error:  # those of the hub, of the network, of the file formats
            raise UserError(f"cannot load the judge {name}: {reason(error)}") from None
        self.model, self.device = model.eval().to(device), device
        begin = self.tokenizer.bos_token_id
        self.begin = [self.tokenizer.eos_token_id if begin is None else begin]
        self.window = min(getattr(model.config, "max_position_embeddings", None) or 1024, 1024)

    def encode(self, texts):
        """List of str -> list of lists of ids."""
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def nll(self, ids):
        """-log p of each of ids (list), which follow `begin`, in nats: (N,)."""
        row = torch.tensor([self.begin + ids], device=self.device)
        logits = self.model(row).logits[0, :-1].float()
        return diffusion.token_nll(logits, row[0, 1:]).cpu()


def load(name, device, dtype="auto"):
    """The judge of that name: a checkpoint of this program, or hf:NAME of another on the Hugging
    Face hub; or of a folder in its format."""
    if name.startswith(HUB) and not exported.is_ours(name):
        return HubJudge(name.removeprefix(HUB), device)
    return CheckpointJudge(name, device, dtype)


@torch.no_grad()
def token_nll(ids, judge):
    """-log p of each of ids (list), in nats, (N,): of a window as it stands, of what follows half a
    window at a time, each behind the half window before it."""
    size = judge.window - len(judge.begin)
    context = size // 2
    found = [judge.nll(ids[:size])]
    for start in range(size, len(ids), size - context):
        piece = ids[start - context : start + size - context]
        found.append(judge.nll(piece)[context:])
    return torch.cat(found)


def ratio_error(amounts, sizes):
    """Standard error of sum(amounts) / sum(sizes) (both (N,)) over another draw of the N; nan of a
    single one."""
    if len(sizes) < 2:
        return math.nan
    left = amounts - amounts.sum() / sizes.sum() * sizes
    return (left.std() / sizes.float().mean() / len(sizes) ** 0.5).item()


def score(texts, judge):
    """Figures (dict) of texts (list of str) together, {} where all are empty: nats a character,
    their standard error over texts (not of a single one), and the perplexity in the judge's own
    tokens."""
    texts = [text for text in texts if text]
    if not texts:
        return {}
    each = [token_nll(ids, judge) for ids in judge.encode(texts)]
    nats = torch.stack([nll.sum() for nll in each])
    lengths = torch.tensor([len(text) for text in texts])
    found = {"judge_nats_per_character": (nats.sum() / lengths.sum()).item()}
    if len(texts) > 1:
        found["judge_se_texts"] = ratio_error(nats, lengths)
    return found | {"judge_perplexity": torch.cat(each).mean().exp().item()}
