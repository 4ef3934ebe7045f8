"""Settings that do not go together: the refusals of Config and SampleConfig, each in one line."""

import os

from utils.cli import check, refuse

MOST_TOKENS = 2**27  # in a training step, of all devices together: a gigabyte of ids

# fmt: off


def training(cfg):
    """Complain of the first thing wrong with a Config."""
    check(cfg)
    block, bos = cfg.block_len or cfg.seq_len, int(cfg.rows != "stream")
    blocks_fill = bos + max(1, (cfg.seq_len - bos) // block) * block
    tokens, head_dim = cfg.batch_size * cfg.seq_len, cfg.n_embd / cfg.n_head
    importance, pairs = cfg.time_sampling == "importance", cfg.complementary
    # under uniform noise "full" is weighted like the others
    unweighted = cfg.loss_weighting in ("pooled", "full") and cfg.objective != "uniform"
    asked = cfg.rows == "pair"
    for wrong, names, why in (
        (os.path.basename(cfg.name) != cfg.name or cfg.name.endswith(".best"), ("name",),
         "must not be a path (--out_dir says where to write) nor end in .best"),
        (tokens > MOST_TOKENS, ("batch_size", "seq_len"),
         f"{tokens:,} tokens a step, more than {MOST_TOKENS:,}; make one of them smaller"),
        (cfg.final_samples * cfg.seq_len > MOST_TOKENS, ("final_samples", "seq_len"),
         f"more than {MOST_TOKENS:,} tokens; make one of them smaller"),
        (cfg.n_embd < 4 and cfg.time_conditioning in ("sinusoidal", "adaln"),
         ("n_embd", "time_conditioning"), "two waves need 4 channels"),
        (head_dim % 2, ("n_embd", "n_head"), "channels of a head must be an even whole number"),
        (cfg.diffusion_steps and cfg.corruption == "count", ("diffusion_steps", "corruption"),
         "discrete times need corruption=bernoulli"),
        (cfg.time_conditioning == "table" and not cfg.diffusion_steps,
         ("time_conditioning", "diffusion_steps"),
         "a table needs diffusion_steps rows; use sinusoidal, or diffusion_steps=100"),
        (pairs and (cfg.corruption != "count" or cfg.schedule != "linear" or cfg.batch_size % 2),
         ("complementary", "corruption", "schedule", "batch_size"),
         "pairs of rows need counts, the linear schedule and an even batch"),
        (cfg.micro_batch and cfg.batch_size % cfg.micro_batch, ("micro_batch", "batch_size"),
         "one must divide the other"),
        (pairs and cfg.micro_batch % 2, ("micro_batch", "complementary"),
         "it must be even, since complementary rows are pairs"),
        (not cfg.max_iters and not cfg.max_minutes, ("max_iters", "max_minutes"),
         "the run would never end; set one of them"),
        (cfg.seq_len not in (block, blocks_fill), ("block_len", "seq_len"),
         "blocks must fill the window" + " but for the <|endoftext|> before them" * bos
         + f"; seq_len={blocks_fill}, say, or block_len=0"),
        (importance and (cfg.diffusion_steps or pairs or unweighted),
         ("time_sampling", "diffusion_steps", "complementary", "loss_weighting"),
         "importance sampling needs continuous time, no pairs, and elbo, flat or clip"),
        (asked and (importance or pairs or unweighted or cfg.short_rows),
         ("rows", "time_sampling", "complementary", "loss_weighting", "short_rows"),
         "pairs of question and answer need uniform times, elbo, flat or clip, and whole rows"),
    ):
        if wrong:
            refuse(cfg, names, why)


def sampling(how):
    """Complain of the first thing wrong with a SampleConfig."""
    check(how)
    given = how.prompt or how.suffix or how.prompt_file
    cached = how.cache in ("prefix", "dual")
    for wrong, names, why in (
        *((getattr(how, name) and (given or how.gen_len), (name,),
           "it says itself what is given and how much to generate; leave out --prompt, --suffix, "
           "--prompt-file and --gen-len") for name in ("infill", "puzzle")),
        (how.infill and how.puzzle, ("infill", "puzzle"), "give one of them"),
        (how.draft and (given or how.gen_len or how.min_len or how.infill or how.puzzle),
         ("draft",), "it is all of the text; leave out --prompt, --suffix, --prompt-file, "
         "--gen-len, --min-len, --infill and --puzzle"),
        (how.no_stop and how.min_len, ("no_stop", "min_len"), "one or the other"),
        (how.prompt_file and how.prompt, ("prompt_file", "prompt"), "give one of them"),
        (cached and not how.decode_block, ("cache", "decode_block"),
         "a cache keeps what is around a block; set --decode-block, 32 say"),
        (cached and how.guidance, ("cache", "guidance"), "one or the other"),
        (how.live and how.json, ("live", "json"), "one or the other"),
    ):
        if wrong:
            refuse(how, names, why)
