"""Judges: autoregressive models that score texts (generative NLL). Low is not good by itself:
repetition is likely too, so that the same figure of real text always stands beside it."""

import torch

import diffusion
from utils import checkpoint, families, runtime
from utils.cli import UserError, reason

HUB = "hf:"  # before a name on the Hugging Face hub, or a folder in its format


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
        """-log p of ids (list), which follow `begin`, in nats: float."""
        row = torch.tensor([self.begin + ids], device=self.device)
        index = torch.arange(len(self.begin), row.size(1), device=self.device)
        with runtime.autocast(self.device, self.dtype):
            logits = self.family.logits(self.model, row, index)
        return diffusion.token_nll(logits, row[0, index]).sum().item()


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
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
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
        """-log p of ids (list), which follow `begin`, in nats: float."""
        row = torch.tensor([self.begin + ids], device=self.device)
        logits = self.model(row).logits[0, :-1].float()
        return diffusion.token_nll(logits, row[0, 1:]).sum().item()


def load(name, device, dtype="auto"):
    """The judge of that name: `hf:NAME`, or the path of a checkpoint."""
    if name.startswith(HUB):
        return HubJudge(name.removeprefix(HUB), device)
    return CheckpointJudge(name, device, dtype)


@torch.no_grad()
def score(texts, judge):
    """Figures (dict) of texts (list of str) together: nats a character, their standard error over
    texts (as of a ratio of two means; not of a single text), and the perplexity in the judge's own
    tokens. Texts are cut in windows, each scored without the one before."""
    texts = [text for text in texts if text]
    nats, tokens, size = [], 0, judge.window - len(judge.begin)
    for ids in judge.encode(texts):
        pieces = torch.tensor(ids, dtype=torch.long).split(size)
        nats.append(sum(judge.nll(piece.tolist()) for piece in pieces))
        tokens += len(ids)
    nats, lengths = torch.tensor(nats), torch.tensor([len(text) for text in texts])
    mean = nats.sum() / lengths.sum().clamp(min=1)
    found = {"judge_nats_per_character": mean.item()}
    if len(texts) > 1:
        spread = (nats - mean * lengths).std() / lengths.float().mean()
        found["judge_se_texts"] = (spread / len(texts) ** 0.5).item()
    return found | {"judge_perplexity": (nats.sum() / max(1, tokens)).exp().item()}
