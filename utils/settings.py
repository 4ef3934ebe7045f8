"""From names of presets, experiment files and flags to a Config."""

import dataclasses
import os
import runpy

from config import PRESETS, Config
from utils.cli import UserError, merge, nearest, reason


def family_defaults(objective, families):
    """What `--objective` sets (dict), whatever the preset has: what the family (of the dict
    `families`) needs."""
    needs = getattr(families.get(objective), "needs", {})
    names = {f.name for f in dataclasses.fields(Config)}
    return {name: allowed[0] for name, allowed in needs.items() if name in names}


def preset(name, families=()):
    """Differences of a preset, or of a Python file that defines `config = {...}`, from the
    defaults."""
    if name in PRESETS:
        return {"name": name} | PRESETS[name]
    if name.endswith(".py"):
        if not os.path.exists(name):
            raise UserError(f"there is no file {name}")
        try:
            settings = runpy.run_path(name).get("config")
        except (Exception, SystemExit) as error:  # whatever the user's file does
            raise UserError(f"{name} does not run: {reason(error)}") from None
        if not isinstance(settings, dict):
            raise UserError(f"{name} does not define config = {{...}}")
        settings, base = dict(settings), {}
        if "preset" in settings:
            base_name = settings.pop("preset")
            if not isinstance(base_name, str) or base_name not in PRESETS:
                raise UserError(
                    f"{name}: there is no preset {base_name}{nearest(base_name, PRESETS)}"
                )
            base = PRESETS[base_name]
        family = (
            family_defaults(str(settings["objective"]), families) if "objective" in settings else {}
        )
        return base | family | {"name": os.path.splitext(os.path.basename(name))[0]} | settings
    raise UserError(
        f"there is no preset {name}{nearest(name, PRESETS)} (--list shows all; a .py file works "
        "too)"
    )


def load(positional, overrides, families):
    """Command line of train.py (preset, flags) -> Config and one line that says what was chosen and
    why; families: `families.FAMILIES`."""
    if len(positional) > 1:
        raise UserError(f"one preset at a time, got {' '.join(positional)}")
    if positional:
        chosen, why = positional[0], "as asked"
    elif "data" in overrides and overrides["data"] != "tales":
        chosen, why = "", "your own data, with the defaults of config.py"
    elif os.path.exists(PRESETS["stories"]["data"]):
        chosen, why = "stories", f"{PRESETS['stories']['data']} has been prepared"
    else:
        chosen = "tales"
        why = f"the built-in corpus; no {PRESETS['stories']['data']} has been prepared"
    base = (
        preset(chosen, families)
        if chosen
        else {"name": os.path.splitext(os.path.basename(overrides["data"]))[0]}
    )
    layers = [
        base,
        family_defaults(overrides["objective"], families) if "objective" in overrides else {},
        overrides,
    ]
    if overrides.get("max_minutes") and "max_iters" not in overrides:
        # a time that the user names replaces the preset's number of steps
        layers.append({"max_iters": 0})
    return merge(Config, *layers), f"preset {chosen}: {why}" if chosen else why
