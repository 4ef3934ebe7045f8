"""Pictures of numbers. matplotlib is imported when one is drawn: it takes seconds, and a GPU machine may lack it."""
import json
import os

from config import UserError


def loss_curves(logs, path):
    """Training loss and held-out bound over the steps of the runs whose JSONL `logs` are given, as a PNG at `path`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, log in enumerate(logs):
        entries = [json.loads(line) for line in open(log, encoding="utf-8")]
        steps = [entry["step"] for entry in entries]
        bound, error = ([entry[key] for entry in entries] for key in ("bound", "bound_se_rows"))
        name = os.path.splitext(os.path.basename(log))[0]
        axis.plot(steps, [entry["loss"] for entry in entries], "--", color=f"C{number}", label=f"{name}: training loss")
        axis.plot(steps, bound, "o-", ms=3, color=f"C{number}", label=f"{name}: held-out bound ± s.e. over rows")
        axis.fill_between(steps, [b - e for b, e in zip(bound, error)], [b + e for b, e in zip(bound, error)],
                          color=f"C{number}", alpha=0.2, lw=0)
    axis.set(xlabel="step", ylabel="nats a token")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)
    plt.close(figure)


def save(figure, path):
    """Write a matplotlib figure; an unwritable path is a UserError."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
