"""All hyperparameters: what to train (`Config`), how to sample (`SampleConfig`), and named settings
(`PRESETS`).

Edit the defaults here, or override them on the command line of train.py and inference.py: every
field is a flag. A preset is a dict of differences from the defaults. An experiment file is the same
in a file of its own:

    # my_experiment.py                       python train.py my_experiment.py --max_iters 2000
    config = {"preset": "shakespeare", "n_layer": 4}
"""

from dataclasses import dataclass

from utils import checks
from utils.cli import field

VERSION = 2  # of what a checkpoint stores

# far above any real use: a slip of the finger ends in one line, not in a machine without memory
SEEDS = 2**62 - 1
LONGEST = 2**17  # tokens of a text or a window
DEVICES, DTYPES = ("auto", "cpu", "cuda", "mps"), ("auto", "float32", "bfloat16", "float16")

# fmt: off


@dataclass(frozen=True)
class Config:
    name: str = field("", "of the run: artifacts/models/NAME.pt (default: the preset's)", "run")
    seed: int = field(1337, "of the weights, the batches and the masks", low=0, high=SEEDS)
    out_dir: str = field("artifacts", "folder for models/, logs/, plots/, tokenizer/")
    resume: str = field("", "continue a run: path of its checkpoint, or auto for the newest")
    init_from: str = field("", "start a new run from the weights of this checkpoint, a "
        "file, a folder or hf:USER/NAME (fine-tuning)")
    max_iters: int = field(2000, "optimizer steps (0: no limit but max_minutes)", low=0)
    max_minutes: float = field(0.0, "stop after this long, the learning rate decayed by then (0: "
        "no limit)", low=0, high=10**6)
    save_interval: int = field(0, "steps between checkpoints (0: eval_interval)", low=0)
    track: str = field("none", "live curves by wandb, trackio or tensorboard, which is to be "
        "installed")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=DEVICES)
    dtype: str = field("auto", "of matrix products; auto: bfloat16 where the hardware has it",
        choices=DTYPES)
    compile: str = field("auto", "torch.compile; auto: on CUDA, and on a CPU for runs that are "
        "long enough", choices=("auto", "on", "off"))

    data: str = field("data/stories.txt", "tales, sudoku4, sudoku6 or sudoku9 (built in), a .txt, "
        ".jsonl or .parquet file, or a folder of shards (scripts/data.py --tokens)", "data")
    held_out: str = field("", "a file that is held out (default: a tenth of data)")
    tokenizer: str = field("bpe", "char, bpe (trained on the corpus), or the path of a "
        "tokenizer.json; shards have their own")
    vocab_size: int = field(2048, "for a bpe trained here, MASK included; char has as many as the "
        "text", low=2, high=2**20)
    rows: str = field("stream", "stream: windows anywhere in the text; document: one document a "
        "row; pair: a question, which is given, and its answer (.jsonl of prompt and completion, "
        "or of messages)", choices=("stream", "document", "pair"))
    max_documents: int = field(0, "train on the first so many training documents (0: all)", low=0)
    short_rows: float = field(0.01, "share of steps on short rows (for short texts)", low=0, high=1)

    n_layer: int = field(6, "transformer blocks", "model", low=1, high=1000)
    n_head: int = field(6, "attention heads", low=1, high=1000)
    n_embd: int = field(384, "channels", low=1, high=2**16)
    seq_len: int = field(256, "tokens in a window", low=2, high=LONGEST, alias="block_size")
    dropout: float = field(0.0, "share of activations dropped in training", low=0, below=1)
    tie_embeddings: bool = field(True, "one matrix for embedding and head: better for BPE")
    init: str = field("normal", "normal: N(0, 0.02) as in GPT-2; zero: projections and head start "
        "at zero", choices=("normal", "zero"))
    time_conditioning: str = field("none", "how the network is told the mask ratio",
        choices=("none", "table", "sinusoidal", "adaln"))
    rope_base: float = field(100.0, "of rotary positions; with a small one a network finds its "
        "near neighbours sooner", low=1)
    softcap: float = field(0.0, "logits are squeezed into -softcap..softcap (0: not)", low=0)

    objective: str = field("masked", "masked: diffusion; uniform: diffusion with random tokens "
        "instead of masks; ar: the same transformer from left to right, to compare", "objective")
    block_len: int = field(0, "tokens of a block of block diffusion, which sees the blocks to its "
        "left (0: seq_len, one block)", low=0)
    schedule: str = field("linear", "mask ratio over time; --list shows all")
    corruption: str = field("count", "count: an exact number of masks a row; bernoulli: each token "
        "by itself", choices=("count", "bernoulli"))
    diffusion_steps: int = field(0, "0: continuous time; T: T discrete times (and rows of the time "
        "table)", low=0, high=10**6)
    loss_weighting: str = field("flat", "weight of a masked token in the training loss; evaluation "
        "is always by the NELBO. full: at all positions", choices=("elbo", "flat", "clip", "pooled",
        "full"))
    time_sampling: str = field("uniform", "importance: times in proportion to the spread of their "
        "losses, reweighted; measured anew every 100 steps", choices=("uniform", "importance"))
    complementary: bool = field(False, "rows in pairs: one text, masked where the other is not")
    self_conditioning: float = field(0.0, "share of training rows that are shown what the network "
        "predicts of them in a first pass; in sampling, what it predicted in the step before",
        low=0, high=1)
    ar_weight: float = field(0.0, "weight of the autoregressive loss of the clean half: uniform "
        "noise in blocks, which then generates from left to right too", low=0)

    batch_size: int = field(64, "rows a step, of all devices together", "optimisation", low=1)
    micro_batch: int = field(0, "rows of one pass, gradients summed up (0: all at once)", low=0)
    activation_checkpointing: bool = field(False, "compute activations twice: less memory, slower")
    optimizer: str = field("muon", "muon: Muon for block matrices, AdamW for the rest; adamw: "
        "AdamW for all", choices=("muon", "adamw"))
    lr: float = field(0.005, "learning rate of AdamW; narrower networks bear more", low=0)
    muon_lr: float = field(0.03, "learning rate of Muon", low=0)
    beta1: float = field(0.8, "AdamW", low=0, below=1)
    beta2: float = field(0.95, "AdamW", low=0, below=1)
    weight_decay: float = field(0.0, "decoupled, on matrices", low=0)
    warmup_iters: int = field(5, "steps of linear warm-up", low=0)
    lr_decay: str = field("linear", "how the learning rate falls to 0",
        choices=("linear", "cosine", "constant"))
    decay_share: float = field(0.5, "share of the run, at its end, over which the learning rate "
        "decays", low=0, high=1)
    grad_clip: float = field(1.0, "largest norm of the gradient (0: off)", low=0)
    ema: float = field(0.0, "decay of an average of the weights, which is then what is judged and "
        "sampled (0: none)", low=0, below=1)

    eval_interval: int = field(250, "steps between held-out bounds and logs", "evaluation", low=1)
    eval_rows: int = field(256, "held-out rows while training, each masked once", low=1)
    final_rows: int = field(256, "held-out rows at the end, each masked final_masks times", low=1)
    final_masks: int = field(8, "masks of each row in the final NELBO", low=1, high=10_000)
    final_samples: int = field(64, "texts that the final metrics judge", low=0, high=10**5)

    def __post_init__(self):
        checks.training(self)

    @property
    def rows_at_once(self):  # of a pass without gradients
        return self.micro_batch or 64


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = field("", "a file, an exported folder, or hf:USER/NAME of the "
        "Hugging Face hub (default: the newest run in artifacts/models, its best; before there is "
        "one, artifacts/pretrained/tales)", "what")
    prompt: str = field("", "text that the result begins with")
    suffix: str = field("", "text that the result ends with")
    infill: str = field("", "text with holes: 'Tom [8] a boat.' has one of 8 tokens, [___] one of "
        "5, \\[ is a bracket")
    draft: str = field("", "a text to improve: what is wrong in it is found and replaced")
    draft_noise: float = field(0.05, "share of the draft that is taken to be wrong", above=0,
        high=1)
    puzzle: str = field("", "a Sudoku row by row, with dots for holes: '..2.4. .....1 ...'")
    prompt_file: str = field("", "a file with a prompt on each line; one result each")
    gen_len: int = field(None, "tokens to generate (default: to the end of the window); may go "
        "beyond it", low=1, high=LONGEST)
    min_len: int = field(0, "tokens to generate at least: no <|endoftext|> among them", low=0,
        high=LONGEST)
    no_stop: bool = field(False, "generate all tokens asked for, beyond <|endoftext|> too")
    num_samples: int = field(1, "how many of each", low=1, high=10**5)
    seed: int = field(1337, "of the first sample; the next has the next number", low=0, high=SEEDS)

    sampler: str = field("", "policy that says which tokens are unmasked next, NAME or "
        "NAME:NUMBER; --list shows all (default: entropy_bounded; under uniform noise reverse, but "
        "for what learned cross entropy in blocks)", "how")
    steps: int = field(None, "most steps; more is better and slower (default: as many as there are "
        "tokens to generate, or, under uniform noise, in the text)", low=1, high=LONGEST)
    schedule: str = field("linear", "mask ratio over the steps")
    min_tokens: int = field(1, "least number of tokens a step, for policies with a count", low=1)
    temperature: float = field(1.0, "of what is drawn from; 0: always the likeliest token; "
        "0.8:0.4 falls over the steps", low=0, ramp="final_temperature")
    final_temperature: float = field(None, "what the temperature falls to", low=0)
    top_k: int = field(0, "draw from the k likeliest tokens (0: all)", low=0)
    # 0.98 leaves text as varied, and cuts off what a small network gives a little too much
    top_p: float = field(0.98, "draw from the likeliest that sum to this (1: all)", above=0, high=1)
    guidance: float = field(0.0, "classifier-free guidance by masking the prompt; twice the work "
        "(0: off)", low=0)
    decode_block: int = field(0, "generate left to right in blocks of so many tokens (0: all at "
        "once; beyond the window a quarter of it)", low=0)
    cache: str = field("auto", "keep keys and values: prefix, dual: around the block, faster, "
        "approximate; auto: only those that stay exact (ar and block models)",
        choices=("auto", "none", "prefix", "dual"))
    cache_refresh: int = field(0, "steps until a cache is made anew (0: once a block)", low=0)
    correctors: int = field(0, "uniform noise: sweeps after each step that draw an eighth of the "
        "tokens anew; with a prompt, 2 bring the text much nearer to what the model means", low=0,
        high=1000)
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=DEVICES)
    dtype: str = field("auto", "of matrix products; auto: as the model was trained", choices=DTYPES)

    viz_video: str = field("", "write an MP4 of the text appearing", "trace")
    viz_gif: str = field("", "write the same as a GIF")
    viz_html: str = field("", "write a page to step through, with the alternatives of each token")
    trace_every: int = field(1, "steps between frames", low=1)
    gif_frame_ms: int = field(180, "milliseconds a frame stays, in GIF and MP4", low=1, high=60_000)
    live: bool = field(False, "show the text in the terminal while it appears")
    frame_ms: int = field(0, "least milliseconds of a step with --live", low=0, high=60_000)
    json: bool = field(False, "print one JSON object a sample instead of text")

    def __post_init__(self):
        checks.sampling(self)


# The published recipe of the two micro-dLLMs, to compare with (artifacts/claims.md says what they,
# the notes and the guide are): discrete times, a table of them, AdamW as PyTorch has it.
# Their sampler is repaired, and row 0 of the table is for clean text only: theirs asks the network
# for the last tokens at row 0, which was never trained.
MICRO = dict(
    rows="stream", tie_embeddings=False, schedule="cos", corruption="bernoulli",
    diffusion_steps=100, time_conditioning="table", init="normal", rope_base=10_000.0,
    optimizer="adamw", lr=3e-4, beta1=0.9, beta2=0.999, weight_decay=0.01, warmup_iters=0,
    lr_decay="constant", grad_clip=0.0, short_rows=0.0, dropout=0.0, batch_size=64, max_iters=5000)

NOTES = MICRO | dict(
    data="data/shakespeare.txt", tokenizer="char", schedule="cos2_s008",
    time_conditioning="sinusoidal", loss_weighting="pooled", seq_len=128, max_iters=105_000)

# What the corpora that are made here share.
MADE = dict(
    rows="document", n_layer=4, n_head=4, n_embd=128, batch_size=48, tie_embeddings=True,
    init="zero", rope_base=10_000.0, loss_weighting="elbo", lr=4e-3, muon_lr=0.02, beta1=0.9,
    warmup_iters=50, max_iters=5000)

# DiffusionGemma's recipe (arXiv:2608.00146) in small: uniform noise in blocks, cross entropy at all
# positions, a network that is not told the noise level but what it said before, and the
# autoregressive loss of the clean half.
CANVAS = dict(
    objective="uniform", corruption="bernoulli", loss_weighting="full", schedule="linear",
    time_conditioning="none", self_conditioning=0.5, ar_weight=0.5)

# What the largest presets share: learning rates that suit 10M parameters are too large for 100M.
LARGE = dict(
    tie_embeddings=False, init="zero", rope_base=10_000.0, lr=3e-3, muon_lr=0.02, beta1=0.9,
    warmup_iters=250)

PRESETS = {
    # The built-in stories. A 2-core CPU trains it in minutes, nearly to their entropy: there the
    # bound itself is the better loss, with smaller steps, and large tied embeddings learn to copy
    # names.
    "tales": MADE | dict(data="tales", vocab_size=1024, seq_len=67),
    # The same stories by the recipe of DiffusionGemma.
    "tales_canvas": MADE | CANVAS | dict(data="tales", vocab_size=1024, seq_len=67, block_len=22),
    # Stories on request: questions and answers.
    "tales_asked": MADE | dict(
        data="tales_asked", rows="pair", vocab_size=1024, seq_len=97, short_rows=0.0),
    # Sudoku grids, of which all is known too, and puzzles with one solution. Layers and heads are
    # what they need: after 2,000 steps 8.7% above the entropy, with 4 heads 17.6%, with 4 layers of
    # those 23%.
    "sudoku": MADE | dict(data="sudoku6", tokenizer="char", seq_len=43, n_layer=6, n_head=8),
    "sudoku4": MADE | dict(data="sudoku4", tokenizer="char", seq_len=21, max_iters=1000),
    "sudoku9": MADE | dict(
        data="sudoku9", tokenizer="char", seq_len=91, n_layer=8, n_head=8, n_embd=192, max_iters=0,
        max_minutes=120.0),
    # The standard small benchmark: nanoGPT's size and text, with our recipe. Few rows a step: on a
    # CPU, steps are what a short run lacks.
    "shakespeare": dict(
        data="data/shakespeare.txt", tokenizer="char", tie_embeddings=False, batch_size=16,
        max_iters=5000),
    # TinyStories: python scripts/data.py, then this.
    "stories": dict(
        data="data/stories.txt", tokenizer="artifacts/tokenizer/tokenizer.json", max_iters=5000),
    # The same for two CPU cores, in an hour. Blocks of 4 learn more in it than masks of the whole
    # window, for which block_len=0; they write from left to right, and fill no holes. Two hours and
    # more want dropout=0.2.
    "stories_small": dict(
        data="data/stories.txt", vocab_size=4096, n_layer=4, n_head=4, n_embd=256, block_len=4,
        batch_size=16, max_iters=0, max_minutes=60.0),
    # The character micro-dLLM: 10,706,304 parameters with Tiny Shakespeare's 65 characters, loss at
    # all positions. Its mean mask ratio is 0.368.
    "micro_char": MICRO | dict(
        data="data/shakespeare.txt", tokenizer="char", loss_weighting="full"),
    # The BPE micro-dLLM: 12,228,480 parameters (its README has those of the character one), loss at
    # masked positions. Its published code has the schedule cos2, not the cos of its README, and
    # 20,000 iterations.
    "micro_bpe": MICRO | dict(
        data="data/stories.txt", tokenizer="artifacts/tokenizer/tokenizer.json",
        loss_weighting="pooled"),
    # The masked-text-diffusion notes: 11.0M parameters; "30 to 40 tokens at once in the last step"
    # is not what their sampler does (sampler "notes": at most 2). Their clip of the mask ratio at
    # .999 is left out: no time would mask all. Sinusoidal time, AdamW as PyTorch has it; 300 steps
    # and 300,000 iterations in notes_300.
    "notes": NOTES,
    "notes_300": NOTES | dict(diffusion_steps=300, max_iters=300_000),
    # The "Let's build a diffusion LM" guide: 6.5M parameters there (it says 12.45M), 6.5M here,
    # with rotary positions instead of learned ones and ReLU^2 instead of GELU; 10 of its epochs are
    # 174,000 steps.
    "guide": dict(
        data="data/shakespeare.txt", tokenizer="char", n_head=8, n_embd=256, seq_len=128,
        dropout=0.1, time_conditioning="adaln", rope_base=10_000.0, corruption="bernoulli",
        loss_weighting="pooled", optimizer="adamw", lr=3e-4, beta1=0.9, beta2=0.999,
        weight_decay=0.01, warmup_iters=1000, lr_decay="cosine", decay_share=1.0, short_rows=0.0,
        max_iters=174_000),
    # GPT-2 small's shape: 85M parameters in blocks. For a GPU; not measured yet, like all that
    # follow.
    "gpt2": LARGE | dict(
        data="data/fineweb_edu.bin", vocab_size=32768, n_layer=12, n_head=12, n_embd=768,
        seq_len=1024, batch_size=256, micro_batch=32, max_iters=10_000, eval_interval=500),
    # 201M parameters in blocks, for one to many GPUs.
    "speedrun": LARGE | dict(
        data="data/fineweb_edu.bin", vocab_size=32768, n_layer=16, n_head=8, n_embd=1024,
        seq_len=1024, batch_size=512, micro_batch=32, max_iters=10_000, eval_interval=500),
    # The standard benchmarks in bits per character: 100 MB each, the last tenth is held out (its
    # first half is what the papers call validation, its second half is their test). enwik8 is
    # counted in bytes: a BPE without merges.
    "text8": LARGE | dict(
        data="data/text8.txt", tokenizer="char", n_layer=12, n_head=12, n_embd=768, batch_size=256,
        dropout=0.05, max_iters=50_000, eval_interval=1000),
    "enwik8": LARGE | dict(
        data="data/enwik8.txt", tokenizer="bpe", vocab_size=258, n_layer=12, n_head=12, n_embd=768,
        batch_size=256, dropout=0.05, max_iters=50_000, eval_interval=1000),
}
